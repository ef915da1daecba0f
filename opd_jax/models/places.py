"""Slots of a row as blocks, dealt to the shards of a sequence.

Of C shards the c-th holds two runs of neighbouring slots, the c-th from either
end: where a token sees those before it, all shards then have the same work.
"Places" are slots in the order of the shards that hold them.

Source: arXiv:2407.21783, Sec. 3.3.2.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from opd_jax.sharding import Axes, Layout

# Slots of a block at most. A row of no more slots, on one device, is scored
# whole: its scores are no larger than a block's.
MAX_BLOCK = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
  """How the slots of a row are cut into blocks, and dealt to shards.

  Attributes:
    slots: S, of the row.
    shards: of the sequence.
    size: slots of a block.
    count: blocks of all shards; the last slots of them may be padding.
  """

  slots: int
  shards: int
  size: int
  count: int

  @classmethod
  def of(cls, slots: int, layout: Layout) -> "Blocks | None":
    """Blocks for rows of `slots` slots; None if they are scored whole."""
    shards = layout.shards("sequence")
    if shards == 1 and slots <= MAX_BLOCK:
      return None
    runs = 1 if shards == 1 else 2 * shards
    length = math.ceil(slots / runs)
    blocks = math.ceil(length / MAX_BLOCK)
    return cls(
      slots=slots,
      shards=shards,
      size=math.ceil(length / blocks),
      count=runs * blocks,
    )

  @functools.cached_property
  def order(self) -> np.ndarray:
    """The block in each place."""
    blocks = np.arange(self.count)
    if self.shards == 1:
      return blocks
    runs = blocks.reshape(2, self.shards, -1)
    return np.stack([runs[0], runs[1, ::-1]], axis=1).reshape(-1)

  def deal(self, x: Int[Array, "B S"], empty: int) -> Int[Array, "B places"]:
    """Slots in their places, `empty` in those of the padding."""
    padding = self.count * self.size - self.slots
    x = jnp.pad(x, ((0, 0), (0, padding)), constant_values=empty)
    blocks = x.reshape(len(x), self.count, self.size)
    return blocks[:, self.order].reshape(x.shape)

  def collect(self, x: jax.Array, axes: Axes, layout: Layout) -> jax.Array:
    """Places in the order of slots again, without the padding.

    Args:
      x: an array with one dimension of places.
      axes: logical names of its dimensions; "sequence" for the places.
      layout: where it lies.
    """
    axis = axes.index("sequence")
    if self.shards > 1:
      spec = layout.spec(layout.fitting(axes, x.shape), x.shape)
      swap = functools.partial(
        _swap_runs, axis=axis, shards=self.shards, over=spec[axis]
      )
      x = jax.shard_map(swap, mesh=layout.mesh, in_specs=spec, out_specs=spec)(
        x
      )
    return jax.lax.slice_in_dim(x, 0, self.slots, axis=axis)

  def split(self, x: jax.Array, axis: int = 1) -> jax.Array:
    """[..., places, ...] -> [shards, ..., places / shards, ...]."""
    if self.shards == 1:
      return x
    shape = (*x.shape[:axis], self.shards, -1, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)

  def merge(self, x: jax.Array, axis: int = 1) -> jax.Array:
    """The inverse of `split`."""
    if self.shards == 1:
      return x
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

  def by_shard(self, function: Callable, layout: Layout) -> Callable:
    """A function of rows, of what `split` made of them.

    Rows and slots cannot be flattened into one dimension, as a matrix product
    does, where both are spread. Inside, those of one shard can.
    """
    if self.shards == 1:
      return function
    return jax.vmap(function, spmd_axis_name=layout.mesh_axes("sequence"))

  def pairs(self, window: int | None) -> Int[np.ndarray, "shards pairs 2"]:
    """What each shard visits: a query's block of its own, and a key's place.

    Args:
      window: how many slots back a query may see, itself included; None for
        all.
    """
    own = self.order.reshape(self.shards, -1, 1)
    back = own - self.order
    seen = back >= 0
    if window is not None:
      seen &= (back - 1) * self.size + 1 < window
    most = seen.sum(axis=(1, 2)).max()
    # A shard with fewer pairs fills up with one that its positions rule out.
    return np.stack(
      [
        np.concatenate(
          [np.argwhere(one), np.argwhere(~one)[:1].repeat(most, axis=0)]
        )[:most]
        for one in seen
      ]
    ).astype(np.int32)


def scored(slots: int, layout: Layout) -> int:
  """Scores of a row and a head that exist at the same time."""
  blocks = Blocks.of(slots, layout)
  return slots**2 if blocks is None else blocks.size**2


def _swap_runs(x: jax.Array, *, axis: int, shards: int, over: Any) -> jax.Array:
  """Runs (c, 2C - 1 - c) of shard c become (2c, 2c + 1).

  Of the two runs of a shard one has an even number, so each of the two moves
  is a permutation of the shards.
  """
  shard = jax.lax.axis_index(over)
  first, second = jnp.split(x, 2, axis=axis)
  held = [(c, 2 * shards - 1 - c) for c in range(shards)]

  def move(parity: int) -> jax.Array:
    run = jnp.where(shard % 2 == parity, first, second)
    target = [
      (c, run // 2)
      for c in range(shards)
      for run in held[c]
      if run % 2 == parity
    ]
    return jax.lax.ppermute(run, over, target)

  return jnp.concatenate([move(0), move(1)], axis=axis)
