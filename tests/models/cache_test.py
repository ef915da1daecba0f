"""Attention to a cache in blocks against attention to all of it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import sequences, sharding
from opd_jax.models import Model, cache, layers
from opd_jax.plan import hlo
from tests.models import tiny
from tests.models.api_test import _compiled_decode, _decode_all

LAYERS, ROWS, HEADS, KV_HEADS, SLOTS, SIZE = 3, 4, 6, 2, 22, 5


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize(
  ("count", "slot", "cap"), [(2, 21, None), (4, 12, 1.5), (5, 0, None)]
)
def test_blocks_equal_the_whole(shards, count, slot, cap):
  """Ragged rows; one sees nothing, and one nothing of the first blocks."""
  random = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.float32)
  query = draw(ROWS, 1, HEADS, SIZE)
  keys, values = (draw(LAYERS, ROWS, KV_HEADS, SLOTS, SIZE) for _ in range(2))
  first = np.array([0, 7, SLOTS, 20])[:, None]
  index = np.arange(SLOTS)[None]
  visible = jnp.asarray((index >= np.minimum(first, slot)) & (index <= slot))
  visible = visible.at[2].set(False)[:, None]
  blocks = functools.partial(
    cache.attend_in_blocks, count=count, shards=shards, scalar=3.0, cap=cap
  )
  got = jax.jit(blocks)(query, keys, values, visible, layer=1, slot=slot)
  # Slots that are not written may hold anything.
  written = keys.at[:, :, :, slot + 1 :].set(0.0)
  want = layers.attend(query, written[1], values[1], visible, 3.0, cap)
  seeing = np.array([0, 1, 3])
  np.testing.assert_allclose(got[seeing], want[seeing], atol=2e-6)
  assert np.isfinite(got).all()


@pytest.mark.parametrize(
  ("keys", "count"), [((1, 1, 2, 4, 16), 1), ((9, 1, 2, 5, 16), 2)]
)
def test_a_layer_that_fits_is_not_cut(monkeypatch, keys, count):
  monkeypatch.setattr(cache, "BLOCK_BYTES", 2 * 4 * 16 * 4)
  assert cache.block_count(jnp.zeros(keys), tiny.layout()) == count


@pytest.mark.parametrize(
  ("name", "mesh"),
  [("gemma2", None), ("qwen3", {"fsdp": 2, "tensor": 2, "context": 2})],
)
def test_decode_in_blocks_equals_the_full_forward_pass(monkeypatch, name, mesh):
  """With windows and caps; with slots spread over devices."""
  layout = tiny.layout(mesh, sharding.DECODE_RULES)
  model, params = Model(tiny.CONFIGS[name], layout), tiny.params(name)
  places = jax.tree.map(lambda leaf: leaf.sharding, model.abstract_params())
  prompts, ids, lengths = tiny.rows()
  tokens, positions = sequences.join(prompts, ids, lengths)
  want = jax.jit(tiny.model(name).hidden)(params, tokens, positions)
  # Twelve slots a row: three blocks on every device.
  per_slot = model.config.num_kv_heads * model.config.head_size * 4 * 4
  monkeypatch.setattr(
    cache, "BLOCK_BYTES", 4 * per_slot // (1 if mesh is None else 8)
  )
  got, _ = _decode_all(
    model, jax.device_put(params, places), prompts, ids, lengths
  )
  start = prompts.tokens.shape[1] - 1
  live = np.asarray(positions[:, start:] >= 0)
  np.testing.assert_allclose(
    np.asarray(got)[live], np.asarray(want[:, start:])[live], atol=2e-5
  )
  text = _compiled_decode(model)
  (scan,) = hlo.analyse(text).loops
  assert [loop.turns for loop in scan.walk()] == [3, 3]
  # Of slots spread over devices a row's sums travel, not its keys.
  assert "all-gather(" not in text


def test_experts_that_no_token_chose_are_not_copied():
  """Kernels of a layer, [6, 20, 12], are read expert by expert."""
  layout = tiny.layout(rules=sharding.DECODE_RULES)
  text = _compiled_decode(Model(tiny.CONFIGS["qwen3_moe"], layout))
  assert re.search(r"f32\[3,6,20,12\]", text)
  assert not re.search(r"f32\[(1,)?6,20,12\]", text)
