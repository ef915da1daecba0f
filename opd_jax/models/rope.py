"""Rotary position embedding (arXiv:2104.09864) and its scalings."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from opd_jax.models.config import Rope


def frequencies(rope: Rope, head_size: int) -> tuple[np.ndarray, float]:
  """Radians per position of each pair, and the factor on cosine and sine.

  Pair i of H/2 turns by theta^(-2 i / H) per position. "linear" divides that by
  `factor`; "llama3" only where a turn is long against the original window, with
  a smooth passage; "yarn" (arXiv:2309.00071) likewise by pair, and scales the
  attention.

  Returns:
    `[H / 2]` float32, and the factor (1 except for "yarn").
  """
  turns = rope.theta ** (-np.arange(0, head_size, 2) / head_size)
  options = dict(rope.options)
  scale = 1.0
  if rope.kind == "linear":
    turns = turns / options["factor"]
  elif rope.kind == "llama3":
    turns = _llama3(turns, options)
  elif rope.kind == "yarn":
    turns = _yarn(turns, options, rope.theta, head_size)
    scale = options.get(
      "attention_factor", 0.1 * math.log(max(options["factor"], 1.0)) + 1.0
    )
  return turns.astype(np.float32), scale


def _llama3(turns: np.ndarray, options: dict[str, float]) -> np.ndarray:
  low, high = options["low_freq_factor"], options["high_freq_factor"]
  cycles = options["original_max_position_embeddings"] * turns / (2 * math.pi)
  keep = np.clip((cycles - low) / (high - low), 0.0, 1.0)
  return turns * (keep + (1.0 - keep) / options["factor"])


def _yarn(
  turns: np.ndarray, options: dict[str, float], theta: float, head_size: int
) -> np.ndarray:
  def pair_with(cycles: float) -> float:
    window = options["original_max_position_embeddings"]
    wavelength = window / (cycles * 2 * math.pi)
    return head_size * math.log(wavelength) / (2 * math.log(theta))

  first = pair_with(options.get("beta_fast", 32.0))
  last = pair_with(options.get("beta_slow", 1.0))
  if options.get("truncate", True):
    first, last = math.floor(first), math.ceil(last)
  first, last = max(first, 0), min(last, head_size - 1)
  if first == last:
    last += 0.001
  ramp = (np.arange(head_size // 2) - first) / (last - first)
  keep = 1.0 - np.clip(ramp, 0.0, 1.0)
  return turns * (keep + (1.0 - keep) / options["factor"])


def angles(
  rope: Rope, head_size: int, positions: Int[Array, "B S"]
) -> tuple[Float[Array, "B S 1 H2"], Float[Array, "B S 1 H2"]]:
  """Cosine and sine of every position, float32, to broadcast over heads."""
  turns, scale = frequencies(rope, head_size)
  angle = (
    positions[..., None, None].astype(jnp.float32) * turns[None, None, None]
  )
  return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def rotate(
  x: Float[Array, "B S N H"],
  cosine: Float[Array, "B S 1 H2"],
  sine: Float[Array, "B S 1 H2"],
) -> Float[Array, "B S N H"]:
  """Turns the pairs (i, i + H/2) of every head; float32 inside."""
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate(
    [first * cosine - second * sine, second * cosine + first * sine], axis=-1
  )
  return turned.astype(x.dtype)
