"""The T axis of [B, T, ...] arrays, cut for a loop over vocabulary heads."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from opd_jax.sharding import Layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunks:
  """How the T axis of [B, T, ...] arrays is cut for a scan.

  Where the sequence is spread, T is first cut into as many parts, and a chunk
  has a piece of every part: its tokens lie where their part lies.
  """

  layout: Layout
  rows: int
  length: int
  parts: int
  count: int
  size: int

  @classmethod
  def of(
    cls, layout: Layout, rows: int, length: int, tokens: int, slots: int
  ) -> "Chunks":
    """Equal chunks of about `tokens` tokens per shard.

    Args:
      layout: where the arrays lie.
      rows: B.
      length: T.
      tokens: of a chunk, per shard of the batch and of the sequence.
      slots: the most that a chunk may have, of all shards together.
    """
    parts = layout.shards("sequence")
    part = math.ceil(length / parts)
    size = tokens // max(1, rows // layout.shards("batch"))
    size = min(size, math.ceil(slots / parts))
    count = math.ceil(part / min(max(size, 1), part))
    return cls(
      layout=layout,
      rows=rows,
      length=length,
      parts=parts,
      count=count,
      size=math.ceil(part / count),
    )

  def cut(self, tree: Any) -> Any:
    """[B, T, ...] -> [chunks, B, C, ...], padded with 0 behind T."""

    def leaf(array: Array) -> Array:
      behind = self.parts * self.count * self.size - self.length
      padding = [(0, 0), (0, behind)] + [(0, 0)] * (array.ndim - 2)
      array = jnp.pad(array, padding)
      shape = (self.rows, self.parts, self.count, self.size, *array.shape[2:])
      array = jnp.moveaxis(array.reshape(shape), 2, 0)
      array = array.reshape(self.count, self.rows, -1, *array.shape[4:])
      axes = (None, "batch", "sequence") + (None,) * (array.ndim - 3)
      return self.layout.constrain(array, axes)

    return jax.tree.map(leaf, tree)

  def join(self, tree: Any) -> Any:
    """The inverse of `cut`."""

    def leaf(array: Array) -> Array:
      shape = (self.count, self.rows, self.parts, self.size, *array.shape[3:])
      array = jnp.moveaxis(array.reshape(shape), 0, 2)
      array = array.reshape(self.rows, -1, *array.shape[4:])
      return array[:, : self.length]

    return jax.tree.map(leaf, tree)

  def apart(self, tree: Any) -> Any:
    """[B, C, ...] of a chunk -> [parts, B, C / parts, ...]."""

    def leaf(array: Array) -> Array:
      shape = (self.rows, self.parts, self.size, *array.shape[2:])
      return array.reshape(shape).swapaxes(0, 1)

    return jax.tree.map(leaf, tree)

  def together(self, tree: Any) -> Any:
    """The inverse of `apart`."""

    def leaf(array: Array) -> Array:
      shape = (self.rows, self.parts * self.size, *array.shape[3:])
      return array.swapaxes(0, 1).reshape(shape)

    return jax.tree.map(leaf, tree)
