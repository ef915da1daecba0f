"""The decoder again in numpy float64, one token and one head at a time."""

import math

import numpy as np


def _norm(config, x, scale):
  scale = 1 + scale if config.norm_offset else scale
  return x / np.sqrt(np.mean(x**2) + config.norm_eps) * scale


def _activate(config, x):
  if config.activation == "silu":
    return x / (1 + np.exp(-x))
  return x / 2 * (1 + np.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))


def soft_cap(scores, cap):
  return scores if cap is None else cap * np.tanh(scores / cap)


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


def _mlp(config, mlp, x):
  if config.experts is not None:
    logits = _linear(mlp["router"], x)
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    chosen = np.argsort(-shares)[: config.experts.per_token]
    total = shares[chosen].sum() if config.experts.renormalize else 1.0
    result = 0.0
    for expert in chosen:
      gate, up, down = (
        mlp[name]["kernel"][expert] for name in ("gate", "up", "down")
      )
      inner = _activate(config, x @ gate) * (x @ up)
      result = result + shares[expert] / total * (inner @ down)
    return result
  gate = _activate(config, _linear(mlp["gate"], x))
  return _linear(mlp["down"], gate * _linear(mlp["up"], x))


def hidden(config, params, tokens, positions):
  """`Model.hidden` of one row; slots at position -1 hold NaN."""
  take = lambda tree, index: (
    {name: take(value, index) for name, value in tree.items()}
    if isinstance(tree, dict)
    else np.asarray(tree, np.float64)[index]
  )
  whole = lambda tree: take(tree, ...)
  group = config.num_heads // config.num_kv_heads
  divisor = math.sqrt(config.query_scalar or config.head_size)
  table = whole(params["embed"])["embedding"]
  if config.scale_embeddings:
    table = table * math.sqrt(config.hidden_size)
  live = [slot for slot, position in enumerate(positions) if position >= 0]
  states = {slot: table[tokens[slot]] for slot in live}
  for index in range(config.num_layers):
    layer = take(params["layers"], index)
    attention, mlp = layer["attention"], layer["mlp"]
    local = config.local_layers[index % len(config.local_layers)]
    rope = (config.local_rope or config.rope) if local else config.rope
    turns, scale = _turns(rope, config.head_size)
    queries, keys, values = {}, {}, {}
    for slot in live:
      x = _norm(config, states[slot], layer["attention_norm"]["scale"])
      query, key = _linear(attention["query"], x), _linear(attention["key"], x)
      values[slot] = _linear(attention["value"], x)
      if config.qk_norm:
        norms = attention["query_norm"]["scale"], attention["key_norm"]["scale"]
        query = np.stack([_norm(config, head, norms[0]) for head in query])
        key = np.stack([_norm(config, head, norms[1]) for head in key])
      turn = lambda head, slot=slot, turns=turns, scale=scale: _rotate(
        head, positions[slot], turns, scale
      )
      queries[slot] = np.stack([turn(head) for head in query])
      keys[slot] = np.stack([turn(head) for head in key])
    for slot in live:
      back = {other: positions[slot] - positions[other] for other in live}
      last = config.window - 1 if local else math.inf
      seen = [other for other in live if 0 <= back[other] <= last]
      mixed = []
      for head in range(config.num_heads):
        scores = np.array(
          [queries[slot][head] @ keys[other][head // group] for other in seen]
        )
        scores = soft_cap(scores / divisor, config.attention_softcap)
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        mixed.append(
          sum(
            weight * values[other][head // group]
            for weight, other in zip(weights, seen, strict=True)
          )
        )
      added = _linear(attention["output"], np.stack(mixed), inputs=2)
      if config.post_norms:
        added = _norm(config, added, layer["attention_post_norm"]["scale"])
      x = states[slot] + added
      added = _mlp(config, mlp, _norm(config, x, layer["mlp_norm"]["scale"]))
      if config.post_norms:
        added = _norm(config, added, layer["mlp_post_norm"]["scale"])
      states[slot] = x + added
  result = np.full((len(tokens), config.hidden_size), np.nan)
  for slot in live:
    result[slot] = _norm(
      config, states[slot], whole(params["final_norm"])["scale"]
    )
  return result
