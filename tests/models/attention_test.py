"""Attention in blocks against the direct form, and what it holds in memory."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import sharding
from opd_jax.models import Model, layers, places
from opd_jax.models.attention import BlockAttention, Places
from opd_jax.models.places import Blocks
from tests.models import tiny

ROWS, SIZE = 4, 6
ONE, BOTH = frozenset({False}), frozenset({False, True})


def _places(slots, packed):
  """Ragged rows, the first with empty slots behind; or packed ones."""
  random = np.random.default_rng(2)
  if packed:
    segments = np.sort(random.integers(0, 3, (ROWS, slots)), axis=1)
    starts = [
      [np.searchsorted(row, segment) for segment in row] for row in segments
    ]
    positions = np.arange(slots) - np.array(starts)
    positions[0, -3:] = segments[0, -3:] = -1
    return jnp.asarray(positions), jnp.asarray(segments)
  lengths = np.array([slots, slots - 5, 3, 1])
  positions = np.arange(slots) - (slots - lengths)[:, None]
  positions[0, -2:] = -1
  return jnp.asarray(np.maximum(positions, -1)), None


@pytest.mark.parametrize(
  ("mesh", "slots", "heads", "kinds", "local", "cap", "packed"),
  [
    ({}, 13, (4, 2), ONE, False, None, False),
    ({}, 23, (4, 1), frozenset({True}), True, 1.5, False),
    ({}, 23, (6, 2), BOTH, True, None, True),
    # Three key/value heads do not divide over two shards: all have them.
    ({"fsdp": 2, "tensor": 2}, 17, (6, 3), BOTH, False, 1.5, False),
    ({"fsdp": 2, "context": 2, "tensor": 2}, 23, (6, 3), BOTH, True, 2.0, True),
    ({"context": 4, "tensor": 2}, 37, (4, 2), BOTH, True, None, False),
    ({"fsdp": 8}, 9, (2, 2), ONE, False, None, False),
  ],
)
def test_blocks_equal_the_direct_form(
  monkeypatch, mesh, slots, heads, kinds, local, cap, packed
):
  """Values and gradients, in float32; rows fewer than shards as well."""
  monkeypatch.setattr(places, "MAX_BLOCK", 4)
  layout = tiny.layout(mesh)
  blocks = Blocks.of(slots, layout)
  positions, segments = _places(slots, packed)
  live = (positions >= 0)[:, :, None, None]
  window, scalar = 5, 11.0
  queries, kv_heads = heads
  random = np.random.default_rng(3)
  draw = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.float32)
  query = draw(ROWS, slots, queries, SIZE)
  keys, values = (draw(ROWS, kv_heads, slots, SIZE) for _ in range(2))
  slopes = jnp.where(live, draw(*query.shape), 0)

  def whole(query, keys, values):
    seen = layers.visible(positions, positions, window if local else None)
    if segments is not None:
      seen &= segments[:, :, None] == segments[:, None, :]
    return layers.attend(query, keys, values, seen, scalar, cap)

  def deal(x, axis):
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, blocks.count * blocks.size - slots)
    index = blocks.order[:, None] * blocks.size + np.arange(blocks.size)
    return jnp.take(jnp.pad(x, padding), index.reshape(-1), axis=axis)

  def in_blocks(query, keys, values):
    attend = BlockAttention(
      blocks=blocks,
      layout=layout,
      window=window,
      kinds=kinds,
      scalar=scalar,
      cap=cap,
    )
    who = Places(
      blocks.deal(positions, -1),
      None if segments is None else blocks.deal(segments, -1),
      jnp.asarray(local),
    )
    mixed = attend(deal(query, 1), deal(keys, 2), deal(values, 2), who)
    return blocks.collect(mixed, ("batch", "sequence", "heads", None), layout)

  def run(function):
    def value(*arrays):
      mixed = jnp.where(live, function(*arrays), 0)
      return jnp.sum(mixed * slopes), mixed

    grad = jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True)
    (_, mixed), slopes_of = jax.jit(grad)(query, keys, values)
    return mixed, *slopes_of

  for got, want in zip(run(in_blocks), run(whole), strict=True):
    assert jnp.max(jnp.abs(want)) > 0.5
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_blocks_that_no_query_sees_are_not_visited():
  layout = tiny.layout()
  blocks = Blocks.of(16 * places.MAX_BLOCK, layout)
  assert blocks.pairs(None).shape == (1, 16 * 17 / 2, 2)
  # Its own block and the one before.
  assert blocks.pairs(places.MAX_BLOCK).shape == (1, 16 + 15, 2)


@pytest.mark.parametrize("window", [None, 700])
def test_shards_of_a_sequence_have_equal_work(window):
  """Every visible pair is visited once, by the shard that holds the query."""
  layout = tiny.layout({"context": 4})
  blocks = Blocks.of(10_000, layout)
  pairs = blocks.pairs(window)
  order = blocks.order.reshape(4, -1)
  visited = [
    (int(order[shard, query]), int(blocks.order[key]))
    for shard in range(4)
    for query, key in pairs[shard]
  ]
  back = lambda query, key: (query - key - 1) * blocks.size + 1
  seen = [
    (query, key)
    for query, key in visited
    if key <= query and (window is None or back(query, key) < window)
  ]
  assert len(seen) == len(set(seen))
  wanted = blocks.count * (blocks.count + 1) // 2
  if window is None:
    assert len(seen) == len(visited) == wanted
  else:
    reach = 1 + math.ceil((window - 1) / blocks.size)
    assert len(seen) == sum(min(b + 1, reach) for b in range(blocks.count))
    assert len(visited) <= 1.1 * len(seen)


@pytest.mark.parametrize("name", ["gemma3", "qwen3"])
def test_a_model_in_blocks_equals_a_model_at_once(monkeypatch, name):
  """Hidden states, and the cache of a prefill; odd lengths."""
  model, params = tiny.model(name), tiny.params(name)
  tokens, positions = tiny.joined(prompt=8, completion=9)

  def run():
    # A new function, so that nothing traced before is found again.
    both = lambda params, tokens, positions: (
      model.hidden(params, tokens, positions),
      model.prefill(params, tokens, positions, 20)[1],
    )
    return jax.jit(both)(params, tokens, positions)

  want, want_cache = run()
  monkeypatch.setattr(places, "MAX_BLOCK", 4)
  got, cache = run()
  live = np.asarray(positions >= 0)
  np.testing.assert_allclose(got[live], want[live], atol=1e-5)
  assert np.isfinite(got).all()
  np.testing.assert_array_equal(cache.positions, want_cache.positions)
  for new, old in (
    (cache.keys, want_cache.keys),
    (cache.values, want_cache.values),
  ):
    assert new.shape == old.shape
    kept = np.moveaxis(np.asarray(new), 3, 2)[:, :, :17][:, live]
    before = np.moveaxis(np.asarray(old), 3, 2)[:, :, :17][:, live]
    np.testing.assert_allclose(kept, before, atol=1e-5)


def _temporaries(mesh, slots=2048, remat="none"):
  """Bytes that a device needs for the gradient of a trunk's states."""
  layout = tiny.layout(mesh)
  model = Model(
    dataclasses.replace(tiny.CONFIGS["llama"], head_size=8), layout, remat=remat
  )
  ids = jax.ShapeDtypeStruct(
    (2, slots), jnp.int32, sharding=layout.replicated()
  )

  def loss(params, tokens, positions):
    return jnp.sum(jnp.square(model.hidden(params, tokens, positions)))

  lowered = jax.jit(jax.grad(loss)).lower(model.abstract_params(), ids, ids)
  return lowered.compile().memory_analysis().temp_size_in_bytes


def test_memory_grows_with_the_slots_and_falls_with_context(monkeypatch):
  in_blocks = _temporaries({})
  spread = _temporaries({"context": 4})
  assert spread < 0.4 * in_blocks
  # Recomputed layers keep no masks of blocks: with them it was 75 MiB.
  assert _temporaries({}, remat="full") < 60 * 2**20
  monkeypatch.setattr(places, "MAX_BLOCK", 10**6)
  # Scores of 2 rows and 4 heads, kept in 3 layers.
  whole = _temporaries({})
  assert whole > 3 * 2 * 4 * 2048**2 * 4
  assert in_blocks < 0.25 * whole


def test_a_name_that_the_mesh_does_not_divide_is_left_out():
  layout = tiny.layout({"context": 4, "fsdp": 2}, sharding.DECODE_RULES)
  axes = ("batch", "sequence", "heads")
  assert layout.fitting(axes, (4, 8, 3)) == axes
  assert layout.fitting(axes, (3, 8, 3)) == (None, "sequence", "heads")
  assert layout.fitting(axes, (4, 6, 3)) == ("batch", None, "heads")
