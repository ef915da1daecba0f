"""The decoder again in numpy float64, one token and one head at a time."""

import math

import numpy as np


def _norm(x, scale, eps):
  return x / np.sqrt(np.mean(x**2) + eps) * scale


def _turns(rope, size):
  """Radians per position of each pair, by the papers' case distinctions."""
  options = dict(rope.options)
  turns, scale = [], 1.0
  for pair in range(size // 2):
    turn = rope.theta ** (-2 * pair / size)
    if rope.kind == "linear":
      turn /= options["factor"]
    elif rope.kind == "llama3":
      window = options["original_max_position_embeddings"]
      wavelength = 2 * math.pi / turn
      low = window / options["low_freq_factor"]
      high = window / options["high_freq_factor"]
      if wavelength > low:
        turn /= options["factor"]
      elif wavelength >= high:
        smooth = (window / wavelength - options["low_freq_factor"]) / (
          options["high_freq_factor"] - options["low_freq_factor"]
        )
        turn = (1 - smooth) * turn / options["factor"] + smooth * turn
    elif rope.kind == "yarn":
      scale = 0.1 * math.log(options["factor"]) + 1.0

      def pair_of(cycles):
        window = options["original_max_position_embeddings"]
        return (size * math.log(window / (cycles * 2 * math.pi))) / (
          2 * math.log(rope.theta)
        )

      first = max(math.floor(pair_of(32)), 0)
      last = min(math.ceil(pair_of(1)), size - 1)
      ramp = min(max((pair - first) / (last - first), 0.0), 1.0)
      turn = turn / options["factor"] * ramp + turn * (1 - ramp)
    turns.append(turn)
  return np.array(turns), scale


def _rotate(x, position, turns, scale):
  pairs = x[: len(turns)] + 1j * x[len(turns) :]
  pairs = pairs * np.exp(1j * position * turns) * scale
  return np.concatenate([pairs.real, pairs.imag])


def _linear(layer, x, inputs=1):
  y = np.tensordot(x, layer["kernel"], axes=inputs)
  return y + layer["bias"] if "bias" in layer else y


def hidden(config, params, tokens, positions):
  """`Model.hidden` of one row; slots at position -1 hold NaN."""
  take = lambda tree, index: (
    {name: take(value, index) for name, value in tree.items()}
    if isinstance(tree, dict)
    else np.asarray(tree, np.float64)[index]
  )
  whole = lambda tree: take(tree, ...)
  turns, scale = _turns(config.rope, config.head_size)
  eps, group = config.norm_eps, config.num_heads // config.num_kv_heads
  table = whole(params["embed"])["embedding"]
  live = [slot for slot, position in enumerate(positions) if position >= 0]
  states = {slot: table[tokens[slot]] for slot in live}
  for index in range(config.num_layers):
    layer = take(params["layers"], index)
    attention, mlp = layer["attention"], layer["mlp"]
    queries, keys, values = {}, {}, {}
    for slot in live:
      x = _norm(states[slot], layer["attention_norm"]["scale"], eps)
      query, key = _linear(attention["query"], x), _linear(attention["key"], x)
      values[slot] = _linear(attention["value"], x)
      if config.qk_norm:
        norms = attention["query_norm"]["scale"], attention["key_norm"]["scale"]
        query = np.stack([_norm(head, norms[0], eps) for head in query])
        key = np.stack([_norm(head, norms[1], eps) for head in key])
      turn = lambda head, slot=slot: _rotate(
        head, positions[slot], turns, scale
      )
      queries[slot] = np.stack([turn(head) for head in query])
      keys[slot] = np.stack([turn(head) for head in key])
    for slot in live:
      seen = [other for other in live if positions[other] <= positions[slot]]
      mixed = []
      for head in range(config.num_heads):
        scores = np.array(
          [queries[slot][head] @ keys[other][head // group] for other in seen]
        ) / math.sqrt(config.head_size)
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        mixed.append(
          sum(
            weight * values[other][head // group]
            for weight, other in zip(weights, seen, strict=True)
          )
        )
      x = states[slot] + _linear(attention["output"], np.stack(mixed), inputs=2)
      inner = _norm(x, layer["mlp_norm"]["scale"], eps)
      gate = _linear(mlp["gate"], inner)
      inner = gate / (1 + np.exp(-gate)) * _linear(mlp["up"], inner)
      states[slot] = x + _linear(mlp["down"], inner)
  result = np.full((len(tokens), config.hidden_size), np.nan)
  for slot in live:
    result[slot] = _norm(
      states[slot], whole(params["final_norm"])["scale"], eps
    )
  return result
