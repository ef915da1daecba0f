"""Exact attention in blocks: memory grows with S, not with S x S.

Queries and keys are cut into blocks. A pair of blocks is scored at a time and
added to a running softmax (maximum, sum and weighted values per query,
float32); pairs of which no query sees a key are not visited. The backward pass
scores each pair again from the logarithm of the sums.

Where the sequence is spread over devices, each has the queries of its own
places, and keys and values are gathered.

Sources: arXiv:2205.14135 and 2307.08691.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from opd_jax.models import layers
from opd_jax.models.places import Blocks
from opd_jax.sharding import Layout

_NOTHING = -1e30


class Places(NamedTuple):
  """What decides who sees whom, of every place of a row.

  Attributes:
    positions: -1 in empty places.
    segments: of the text that a place belongs to; None for one text a row.
    local: whether the window holds.
  """

  positions: Int[Array, "B S"]
  segments: Int[Array, "B S"] | None
  local: Bool[Array, ""]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockAttention:
  """Attention of rows over themselves; hashable, so it may be static.

  Attributes:
    blocks: how rows are cut.
    layout: where they lie.
    window: of local layers; None without.
    kinds: whether layers are local: one or both of (False, True).
    scalar: divides the scores, as its root; None for the size of a head.
    cap: of the scores, see `layers.soft_cap`; None for none.
  """

  blocks: Blocks
  layout: Layout
  window: int | None
  kinds: frozenset[bool]
  scalar: float | None
  cap: float | None

  def __call__(
    self,
    query: Float[Array, "B S N H"],
    keys: Float[Array, "B M S H"],
    values: Float[Array, "B M S H"],
    places: Places,
  ) -> Float[Array, "B S N H"]:
    """`layers.attend` of rows whose slots lie in their places.

    What a token sees is what `Model` says. Without segments the positions of
    a row count up by one from slot to slot. A query that sees nothing gets 0.

    Args:
      query: rotated.
      keys: rotated.
      values: of the same slots.
      places: who sees whom.
    """
    return _attend(self, query, keys, values, places)

  def specs(self, query: Any, keys: Any) -> "_Specs":
    """Where the arguments and results of one device lie."""
    names = ("batch", "sequence", "heads", None)
    fitting = self.layout.fitting(names, query.shape)
    rows, places, heads, _ = self.layout.spec(fitting, query.shape)
    (kv_heads,) = self.layout.spec(("kv_heads",), keys.shape[1:2])
    return _Specs(
      query=PartitionSpec(rows, places, heads, None),
      keys=PartitionSpec(rows, kv_heads, places, None),
      positions=PartitionSpec(rows, None),
      sums=PartitionSpec(places, rows, heads, None),
    )

  def run(self, function: Callable, arguments: Any, specs: Any, to: Any) -> Any:
    """Applies a function of local arrays on every device."""
    return jax.shard_map(
      function,
      mesh=self.layout.mesh,
      in_specs=specs,
      out_specs=to,
      check_vma=False,
    )(*arguments)

  def over_pairs(
    self,
    places: Places,
    step: Callable[[Any, Any, Any, int | None], Any],
    start: Any,
  ) -> Any:
    """Folds `step` over the pairs of blocks that this device visits.

    Args:
      places: of the rows; the window is looked at where they are local.
      step: of what was so far, block of queries, place of keys, window.
      start: what there is before the first.
    """
    shard = jax.lax.axis_index(self.layout.mesh_axes("sequence"))

    def loop(window: int | None) -> Any:
      # Texts may lie apart in a row of several: slots then say less.
      back = window if places.segments is None else None
      pairs = jnp.asarray(self.blocks.pairs(back))[shard]

      def body(carry: Any, pair: Int[Array, " 2"]) -> tuple[Any, None]:
        return step(carry, pair[0], pair[1], window), None

      return jax.lax.scan(body, start, pairs)[0]

    if self.kinds == {False}:
      return loop(None)
    if self.kinds == {True}:
      return loop(self.window)
    return jax.lax.cond(
      places.local, lambda: loop(self.window), lambda: loop(None)
    )


class _Specs(NamedTuple):
  """Of queries and what is made of them, of keys and values, of the rest."""

  query: PartitionSpec
  keys: PartitionSpec
  positions: PartitionSpec
  sums: PartitionSpec


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
  how: BlockAttention, query: Any, keys: Any, values: Any, places: Places
) -> jax.Array:
  return _forward(how, query, keys, values, places)[0]


def _forward(
  how: BlockAttention, query: Any, keys: Any, values: Any, places: Places
) -> tuple[jax.Array, Any]:
  def local(query: Any, keys: Any, values: Any, places: Places) -> Any:
    tiles = _Tiles(how, kv_heads, query, keys, values, places)

    def step(carry: Any, i: Any, j: Any, window: int | None) -> Any:
      mixed, top, total = (_at(part, i) for part in carry)
      scores, visible = tiles.scores(i, j, window)
      seen = jnp.where(visible, scores, _NOTHING)
      new = jnp.maximum(top, jnp.max(seen, axis=-1))
      weights = jnp.where(visible, jnp.exp(scores - new[..., None]), 0.0)
      shrink = jnp.exp(top - new)
      added = layers.product(
        "bmgqs,bmsh->bmgqh",
        weights.astype(values.dtype),
        _at(tiles.values, j),
        dtype=jnp.float32,
      )
      mixed = mixed * shrink[..., None] + added
      total = total * shrink + jnp.sum(weights, axis=-1)
      return tuple(
        _put(part, x, i)
        for part, x in zip(carry, (mixed, new, total), strict=True)
      )

    zeros = jnp.zeros(tiles.query.shape, jnp.float32)
    sums = jnp.zeros(tiles.query.shape[:-1], jnp.float32)
    start = (zeros, jnp.full_like(sums, _NOTHING), sums)
    mixed, top, total = how.over_pairs(places, step, start)
    # The largest term of a sum is 1: less is a query that sees nothing.
    total = jnp.maximum(total, 1.0)
    mixed = (mixed / total[..., None]).astype(values.dtype)
    return tiles.untile(mixed), top + jnp.log(total)

  # Else rematerialisation would keep the masks of all pairs of blocks, which do
  # not depend on what it recomputes.
  query, places = jax.lax.optimization_barrier((query, places))
  kv_heads, specs = keys.shape[1], how.specs(query, keys)
  out, sums = how.run(
    local,
    (query, keys, values, places),
    (specs.query, specs.keys, specs.keys, _of_places(places, specs)),
    (specs.query, specs.sums),
  )
  return out, (query, keys, values, places, out, sums)


def _backward(how: BlockAttention, kept: Any, slopes: jax.Array) -> Any:
  query, keys, values, places, out, sums = kept

  def local(
    query: Any,
    keys: Any,
    values: Any,
    places: Places,
    out: Any,
    sums: Any,
    slopes: Any,
  ) -> Any:
    tiles = _Tiles(how, kv_heads, query, keys, values, places)
    slopes = slopes.astype(values.dtype)
    wide = slopes.astype(jnp.float32) * out.astype(jnp.float32)
    spent = jnp.sum(tiles.tile(wide), axis=-1)
    slopes = tiles.tile(slopes)

    def step(carry: Any, i: Any, j: Any, window: int | None) -> Any:
      scores, visible = tiles.scores(i, j, window)
      weights = jnp.where(
        visible, jnp.exp(scores - _at(sums, i)[..., None]), 0.0
      )
      slope = _at(slopes, i)
      to_weights = layers.product(
        "bmgqh,bmsh->bmgqs", slope, _at(tiles.values, j), dtype=jnp.float32
      )
      to_scores = weights * (to_weights - _at(spent, i)[..., None])
      if how.cap is not None:
        to_scores = to_scores * (1.0 - jnp.square(scores / how.cap))
      to_scores = (to_scores / tiles.divisor).astype(query.dtype)
      added = (
        layers.product(
          "bmgqs,bmsh->bmgqh", to_scores, _at(tiles.keys, j), dtype=jnp.float32
        ),
        layers.product(
          "bmgqs,bmgqh->bmsh", to_scores, _at(tiles.query, i), dtype=jnp.float32
        ),
        layers.product(
          "bmgqs,bmgqh->bmsh",
          weights.astype(values.dtype),
          slope,
          dtype=jnp.float32,
        ),
      )
      return tuple(
        _put(total, _at(total, index) + x, index)
        for total, x, index in zip(carry, added, (i, j, j), strict=True)
      )

    start = tuple(
      jnp.zeros(part.shape, jnp.float32)
      for part in (tiles.query, tiles.keys, tiles.values)
    )
    to_query, *to_keys = how.over_pairs(places, step, start)
    to_query = tiles.untile(to_query.astype(query.dtype))
    return (to_query, *(tiles.ungather(slope) for slope in to_keys))

  kv_heads, specs = keys.shape[1], how.specs(query, keys)
  slopes = how.run(
    local,
    (query, keys, values, places, out, sums, slopes),
    (
      specs.query,
      specs.keys,
      specs.keys,
      _of_places(places, specs),
      specs.query,
      specs.sums,
      specs.query,
    ),
    (specs.query, specs.keys, specs.keys),
  )
  return (*slopes, None)


_attend.defvjp(_forward, _backward)


def _of_places(places: Places, specs: _Specs) -> Any:
  whole, once = specs.positions, PartitionSpec()
  return jax.tree.unflatten(
    jax.tree.structure(places),
    [whole, once] if places.segments is None else [whole, whole, once],
  )


class _Tiles:
  """One device's queries, keys and values as stacks of blocks.

  Its query heads are taken as U groups of G that share a key/value head each.
  Where key/value heads are too few to be spread and queries are, every device
  picks those that its queries need.

  Attributes:
    query: [own blocks, B, U, G, block, H].
    keys: [blocks, B, U, block, H], of all shards.
    values: the same.
    divisor: of the scores.
  """

  def __init__(
    self,
    how: BlockAttention,
    kv_heads: int,
    query: Float[Array, "B L N H"],
    keys: Float[Array, "B M L H"],
    values: Float[Array, "B M L H"],
    places: Places,
  ):
    layout, blocks = how.layout, how.blocks
    heads, size = query.shape[2:]
    self.how, self.places, self.kept = how, places, keys
    self.over = layout.mesh_axes("sequence")
    self.divisor = math.sqrt(size if how.scalar is None else how.scalar)
    self.across, self.picked = layout.mesh_axes("heads"), None
    groups, shards = keys.shape[1], layout.shards("heads")
    if kv_heads % shards:
      served = heads * shards // kv_heads
      groups = heads // math.gcd(heads, served)
      first = jax.lax.axis_index(self.across) * heads
      self.picked = (first + jnp.arange(groups) * (heads // groups)) // served
    own = blocks.count // blocks.shards
    self.first = jax.lax.axis_index(self.over) * own
    self.shape = (own, len(query), groups, heads // groups, blocks.size, size)
    self.query, self.keys, self.values = (
      self.tile(query),
      self._gather(keys),
      self._gather(values),
    )

  def tile(self, x: Float[Array, "B L N H"]) -> Float[Array, "n B U G b H"]:
    """As `query`."""
    own, rows, groups, shared, block, _ = self.shape
    x = x.reshape(rows, own, block, groups, shared, -1)
    return x.transpose(1, 0, 3, 4, 2, 5)

  def untile(self, x: Float[Array, "n B U G b H"]) -> Float[Array, "B L N H"]:
    """The inverse of `tile`."""
    own, rows, groups, shared, block, size = self.shape
    x = x.transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(rows, own * block, groups * shared, size)

  def _gather(self, x: Float[Array, "B M L H"]) -> Float[Array, "n B U b H"]:
    if self.how.blocks.shards > 1:
      x = jax.lax.all_gather(x, self.over, axis=2, tiled=True)
    if self.picked is not None:
      x = x[:, self.picked]
    rows, heads, _, size = x.shape
    count, block = self.how.blocks.count, self.how.blocks.size
    return x.reshape(rows, heads, count, block, size).transpose(2, 0, 1, 3, 4)

  def ungather(self, x: Float[Array, "n B U b H"]) -> Float[Array, "B M L H"]:
    """A slope of the gathered keys, as one of the device's own."""
    count, rows, groups, block, size = x.shape
    x = x.transpose(1, 2, 0, 3, 4).reshape(rows, groups, count * block, size)
    if self.picked is not None:
      heads = self.kept.shape[1]
      whole = jnp.zeros((rows, heads, *x.shape[2:]), x.dtype)
      x = jax.lax.psum(whole.at[:, self.picked].add(x), self.across)
    if self.how.blocks.shards > 1:
      x = jax.lax.psum_scatter(x, self.over, scatter_dimension=2, tiled=True)
    return x.astype(self.kept.dtype)

  def scores(
    self, i: Int[Array, ""], j: Int[Array, ""], window: int | None
  ) -> tuple[Float[Array, "B U G b b"], Bool[Array, "B 1 1 b b"]]:
    """Of an own block of queries with a block of keys, and what is seen."""
    scores = layers.product(
      "bmgqh,bmsh->bmgqs",
      _at(self.query, i),
      _at(self.keys, j),
      dtype=jnp.float32,
    )
    scores = scores / self.divisor
    if self.how.cap is not None:
      scores = layers.soft_cap(scores, self.how.cap)
    block = self.how.blocks.size

    def cut(x: Int[Array, "B S"], index: Any) -> Int[Array, "B b"]:
      return jax.lax.dynamic_slice_in_dim(x, index * block, block, axis=1)

    here = self.first + i
    positions, segments, _ = self.places
    visible = layers.visible(cut(positions, here), cut(positions, j), window)
    if segments is not None:
      visible &= cut(segments, here)[:, :, None] == cut(segments, j)[:, None]
    return scores, visible[:, None, None]


def _at(stack: jax.Array, index: Int[Array, ""]) -> jax.Array:
  return jax.lax.dynamic_index_in_dim(stack, index, keepdims=False)


def _put(
  stack: jax.Array, value: jax.Array, index: Int[Array, ""]
) -> jax.Array:
  return jax.lax.dynamic_update_index_in_dim(stack, value, index, 0)
