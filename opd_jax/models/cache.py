"""Keys and values of the tokens seen so far, and attention of one more to them.

Decoding is as fast as weights and cache are read. A compiler reads a layer of
the cache once if it fits into on-chip memory; if not, it copies the layer
before the product, which moves three times as much. So a larger layer is
attended to in blocks of slots that do fit, with a running softmax
(arXiv:2205.14135, algorithm 1), and blocks behind the last written slot are not
read at all.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from opd_jax.models import layers
from opd_jax.sharding import Axes, Layout

# Of the keys of a block, on a device: a small part of the 64 MiB and more that
# TPUs have on chip, and large enough to hide what a turn of a loop costs.
BLOCK_BYTES = 16 * 2**20

# The score of a slot that a row does not see.
_HIDDEN = -1e30

CACHE_AXES: Axes = ("layers", "batch", "kv_heads", "sequence", "head_size")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
  """S slots per row; the position of a slot says who may see it.

  Attributes:
    keys: rotated keys, in the compute dtype.
    values: values, in the compute dtype.
    positions: of the token in each slot; -1 where there is none.
  """

  keys: Float[Array, "L B M S H"]
  values: Float[Array, "L B M S H"]
  positions: Int[Array, "B S"]

  def repeat(self, n: int) -> "KVCache":
    """Every row n times in a row: B becomes B * n."""
    return KVCache(
      keys=jnp.repeat(self.keys, n, axis=1),
      values=jnp.repeat(self.values, n, axis=1),
      positions=jnp.repeat(self.positions, n, axis=0),
    )


def attend(
  query: Float[Array, "B 1 N H"],
  cache: KVCache,
  visible: Bool[Array, "B 1 S"],
  *,
  layer: Int[Array, ""],
  slot: Int[Array, ""] | int,
  layout: Layout,
  scalar: float | None = None,
  cap: float | None = None,
) -> Float[Array, "B 1 N H"]:
  """`layers.attend` to one layer of a cache, in blocks if it is large.

  Args:
    query: rotated.
    cache: with the keys and values of the query's own token.
    visible: the slots that each row sees.
    layer: the one to attend to.
    slot: the last one that is written.
    layout: of the cache.
    scalar: see `layers.attend`.
    cap: see `layers.attend`.
  """
  count = block_count(cache.keys, layout)
  if count == 1:
    here = functools.partial(
      jax.lax.dynamic_index_in_dim, index=layer, keepdims=False
    )
    keys, values = here(cache.keys), here(cache.values)
    return layers.attend(query, keys, values, visible, scalar, cap)
  return attend_in_blocks(
    query,
    cache.keys,
    cache.values,
    visible,
    layer=layer,
    slot=slot,
    count=count,
    shards=layout.shards("sequence"),
    scalar=scalar,
    cap=cap,
  )


def block_count(keys: Float[Array, "L B M S H"], layout: Layout) -> int:
  """Blocks that the slots of a device are cut into."""
  place = layout.sharding(layout.fitting(CACHE_AXES, keys.shape), keys.shape)
  layer = math.prod(place.shard_shape(keys.shape)[1:]) * keys.dtype.itemsize
  return -(-layer // BLOCK_BYTES)


def attend_in_blocks(
  query: Float[Array, "B 1 N H"],
  keys: Float[Array, "L B M S H"],
  values: Float[Array, "L B M S H"],
  visible: Bool[Array, "B 1 S"],
  *,
  layer: Int[Array, ""],
  slot: Int[Array, ""] | int,
  count: int,
  shards: int,
  scalar: float | None = None,
  cap: float | None = None,
) -> Float[Array, "B 1 N H"]:
  """`layers.attend` to one layer of a cache, in blocks of its slots.

  Args:
    query: rotated.
    keys: rotated, of all layers.
    values: of the same slots.
    visible: the slots that each row sees.
    layer: the one to attend to.
    slot: the last one that is written.
    count: of blocks.
    shards: that the slots are spread over; each has as many blocks.
    scalar: see `layers.attend`.
    cap: see `layers.attend`.
  """
  _, batch, kv_heads, slots, size = keys.shape
  length = slots // shards
  block = -(-length // count)
  grouped = query.reshape(batch, kv_heads, -1, size)
  apart = lambda x: x.reshape(*x.shape[:3], shards, length, size)
  keys, values = apart(keys), apart(values)
  seen = visible.reshape(batch, shards, length)

  def take(array: Array, start: Array) -> Array:
    where = (layer, 0, 0, 0, start, 0)
    part = (1, batch, kv_heads, shards, block, size)
    return jax.lax.dynamic_slice(array, where, part)[0]

  def step(index: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
    peak, total, mixed = state
    # The last block begins early, with slots of the one before.
    start = jnp.minimum(index * block, length - block)
    new = start + jnp.arange(block) >= index * block
    here = jax.lax.dynamic_slice_in_dim(seen, start, block, axis=2) & new
    scores = layers.product(
      "bmgh,bmcsh->bmgcs", grouped, take(keys, start), dtype=jnp.float32
    )
    scores = scores / math.sqrt(size if scalar is None else scalar)
    if cap is not None:
      scores = layers.soft_cap(scores, cap)
    scores = jnp.where(here[:, None, None], scores, _HIDDEN)
    higher = jnp.maximum(peak, jnp.max(scores, axis=-1))
    weights = jnp.exp(scores - higher[..., None])
    kept = jnp.exp(peak - higher)
    part = layers.product(
      "bmgcs,bmcsh->bmgch",
      weights.astype(values.dtype),
      take(values, start),
      dtype=jnp.float32,
    )
    total = total * kept + jnp.sum(weights, axis=-1)
    return higher, total, mixed * kept[..., None] + part

  shape = (*grouped.shape[:3], shards)
  start = (
    jnp.full(shape, _HIDDEN),
    jnp.zeros(shape),
    jnp.zeros((*shape, size)),
  )
  written = jnp.asarray(slot, jnp.int32) // block + 1
  peak, total, mixed = layers.turns(written, count, step, start)
  share = jnp.exp(peak - jnp.max(peak, axis=-1, keepdims=True))
  total = jnp.sum(total * share, axis=-1)
  mixed = jnp.sum(mixed * share[..., None], axis=-2) / total[..., None]
  return mixed.astype(values.dtype).reshape(query.shape)
