"""The model against numpy, with a cache, rematerialised, on eight devices."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import sequences, sharding
from opd_jax.models import CACHE_AXES, KVCache, Model
from opd_jax.types import MASKED_LOGPROB
from tests.models import oracle, tiny

families = pytest.mark.parametrize("name", tiny.CONFIGS)
EIGHT = {"replica": 2, "fsdp": 2, "tensor": 2}
CONTEXT = {"fsdp": 2, "tensor": 2, "context": 2}
EIGHT_OF = {
  "llama": EIGHT,
  "llama_biases": CONTEXT,
  "mistral": CONTEXT,
  "gemma2": CONTEXT,
  "gemma3": EIGHT,
  "qwen3_moe": {"fsdp": 2, "tensor": 2, "expert": 2},
}


@families
def test_hidden_equals_numpy_on_ragged_rows(name):
  model, params = tiny.model(name), tiny.params(name)
  tokens, positions = tiny.joined()
  got = np.asarray(jax.jit(model.hidden)(params, tokens, positions))
  host = jax.tree.map(np.asarray, params)
  for row in range(tokens.shape[0]):
    want = oracle.hidden(
      model.config, host, np.asarray(tokens[row]), np.asarray(positions[row])
    )
    live = np.asarray(positions[row]) >= 0
    np.testing.assert_allclose(got[row][live], want[live], atol=2e-5)
  assert np.isfinite(got).all()


@families
def test_segments_of_a_row_do_not_see_each_other(name):
  """Numpy runs each text by itself; one lies between the parts of another."""
  model, params = tiny.model(name), tiny.params(name)
  random = np.random.default_rng(4)
  tokens = random.integers(0, model.config.vocab_size, (1, 12))
  segments = np.array([[0, 0, 0, 1, 1, 1, 1, 0, 0, 2, -1, -1]])
  positions = np.array([[0, 1, 2, 0, 1, 2, 3, 3, 4, 0, -1, -1]])
  got = np.asarray(jax.jit(model.hidden)(params, tokens, positions, segments))
  host = jax.tree.map(np.asarray, params)
  for segment in (0, 1, 2):
    here = segments[0] == segment
    want = oracle.hidden(
      model.config, host, tokens[0, here], positions[0, here]
    )
    np.testing.assert_allclose(got[0, here], want, atol=2e-5)
  assert np.isfinite(got).all()


@families
def test_logits_are_products_with_the_output_layer(name):
  model, params = tiny.model(name), tiny.params(name)
  config = model.config
  hidden = np.random.default_rng(3).standard_normal(
    (2, 3, config.hidden_size), np.float32
  )
  logits = jax.jit(model.logits)(params, hidden)
  head = params["embed" if config.tie_embeddings else "lm_head"]["embedding"]
  want = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
  want = oracle.soft_cap(want, config.logit_softcap)
  assert logits.shape == (2, 3, config.padded_vocab_size)
  np.testing.assert_allclose(
    logits[..., : config.vocab_size], want[..., : config.vocab_size], atol=1e-5
  )
  np.testing.assert_array_equal(
    logits[..., config.vocab_size :], MASKED_LOGPROB
  )
  gradient = jax.grad(lambda head: model.logits(head, hidden).sum())(
    model.split_head(params)[1]
  )
  (table,) = jax.tree.leaves(gradient)
  assert np.all(np.asarray(table)[config.vocab_size :] == 0)
  assert np.all(np.asarray(table)[: config.vocab_size] != 0)


def _decode_all(model, params, prompts, ids, lengths, repeat=1):
  """Hidden states of the last prompt id and of every completion id."""
  tokens, positions = sequences.right_align(prompts)
  slots = tokens.shape[1] + ids.shape[1]
  last, cache = jax.jit(model.prefill, static_argnums=3)(
    params, tokens, positions, slots
  )
  cache = cache.repeat(repeat)
  states = [jnp.repeat(last, repeat, axis=0)]
  decode = jax.jit(model.decode)
  for step in range(ids.shape[1]):
    position = jnp.repeat(prompts.lengths, repeat) + step
    position = jnp.where(step < lengths, position, -1)
    slot = tokens.shape[1] + step
    state, cache = decode(params, cache, ids[:, step], position, slot)
    states.append(state)
  return jnp.stack(states, axis=1), cache


@families
def test_decode_with_a_cache_equals_the_full_forward_pass(name):
  model, params = tiny.model(name), tiny.params(name)
  prompts, ids, lengths = tiny.rows()
  got, cache = _decode_all(model, params, prompts, ids, lengths)
  tokens, positions = sequences.join(prompts, ids, lengths)
  want = jax.jit(model.hidden)(params, tokens, positions)
  start = prompts.tokens.shape[1] - 1
  live = np.asarray(positions[:, start:] >= 0)
  np.testing.assert_allclose(
    np.asarray(got)[live], np.asarray(want[:, start:])[live], atol=2e-5
  )
  assert np.isfinite(got).all()
  np.testing.assert_array_equal(cache.positions, positions)


def test_rollouts_share_the_prefill_of_their_prompt():
  model, params = tiny.model("llama"), tiny.params("llama")
  prompts, _, _ = tiny.rows(batch=2)
  ids = jnp.arange(24, dtype=jnp.int32).reshape(6, 4)
  lengths = jnp.full((6,), 4)
  got, _ = _decode_all(model, params, prompts, ids, lengths, repeat=3)
  repeated = jax.tree.map(lambda x: jnp.repeat(x, 3, axis=0), prompts)
  want, _ = _decode_all(model, params, repeated, ids, lengths)
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_an_empty_cache_filled_by_decode_alone_equals_the_forward_pass():
  model, params = tiny.model("llama"), tiny.params("llama")
  _, ids, _ = tiny.rows()
  cache = jax.jit(model.init_cache, static_argnums=(0, 1))(*ids.shape)
  decode, states = jax.jit(model.decode), []
  for step in range(ids.shape[1]):
    position = jnp.full(ids.shape[:1], step)
    state, cache = decode(params, cache, ids[:, step], position, step)
    states.append(state)
  positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
  want = jax.jit(model.hidden)(params, ids, positions)
  np.testing.assert_allclose(jnp.stack(states, axis=1), want, atol=2e-5)


def _loss(model, params, tokens, positions):
  trunk, head = model.split_head(params)
  logits = model.logits(head, model.hidden(trunk, tokens, positions))
  logprobs = jax.nn.log_softmax(logits[:, :-1])
  taken = jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[..., 0]
  return -jnp.sum(jnp.where(positions[:, :-1] >= 0, taken, 0.0))


def _gradient(model, params):
  tokens, positions = tiny.joined()
  value_and_grad = jax.value_and_grad(
    lambda params: _loss(model, params, tokens, positions)
  )
  return jax.jit(value_and_grad)(params)


def _assert_trees_close(got, want, **tolerance):
  jax.tree.map_with_path(
    lambda path, a, b: np.testing.assert_allclose(
      a, b, **tolerance, err_msg=jax.tree_util.keystr(path)
    ),
    got,
    want,
  )


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "qwen3_moe"])
def test_programs_do_not_grow_with_the_depth(name):
  def size(layers):
    config = dataclasses.replace(tiny.CONFIGS[name], num_layers=layers)
    model = Model(config, tiny.layout())
    lowered = jax.jit(model.hidden).lower(
      model.abstract_params(), *tiny.joined()
    )
    return lowered.as_text().count("dot_general")

  assert size(24) == size(5) > 0


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe"])
def test_rematerialisation_changes_no_gradient(name):
  params = tiny.params(name)
  want = _gradient(tiny.model(name), params)
  for remat in ("dots", "full"):
    got = _gradient(tiny.model(name, remat=remat), params)
    _assert_trees_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  ("name", "sizes"),
  [
    *EIGHT_OF.items(),
    ("qwen3_moe", {"tensor": 2, "context": 2, "expert": 2}),
  ],
)
def test_eight_devices_equal_one(name, sizes):
  params = tiny.params(name)
  want = _gradient(tiny.model(name), params)
  spread = Model(tiny.CONFIGS[name], tiny.layout(sizes))
  shardings = jax.tree.map(lambda leaf: leaf.sharding, spread.abstract_params())
  placed = jax.device_put(params, shardings)
  got = _gradient(spread, placed)
  _assert_trees_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama_biases", "gemma3", "qwen3_moe"])
def test_eight_devices_decode_as_one(name):
  params = tiny.params(name)
  rows = tiny.rows()
  want, _ = _decode_all(tiny.model(name), params, *rows)
  layout = tiny.layout(EIGHT_OF[name], sharding.DECODE_RULES)
  spread = Model(tiny.CONFIGS[name], layout)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, spread.abstract_params())
  got, cache = _decode_all(spread, jax.device_put(params, shardings), *rows)
  # A token behind the end of its row sees nothing, and its state means nothing.
  _, ids, lengths = rows
  live = np.arange(ids.shape[1] + 1) <= np.asarray(lengths)[:, None]
  assert 0.5 < live.mean() < 1
  np.testing.assert_allclose(
    np.asarray(got)[live], np.asarray(want)[live], atol=2e-5
  )
  assert cache.keys.sharding.is_equivalent_to(
    layout.sharding(CACHE_AXES, cache.keys.shape), cache.keys.ndim
  )


def _compiled_decode(model, rows=4):
  """The text of the program that decodes a token."""
  layout = model.layout
  place = lambda leaf, axes: jax.ShapeDtypeStruct(
    leaf.shape, leaf.dtype, sharding=layout.sharding(axes, leaf.shape)
  )
  cache = jax.eval_shape(lambda: model.init_cache(rows, 12))
  cache = KVCache(
    keys=place(cache.keys, CACHE_AXES),
    values=place(cache.values, CACHE_AXES),
    positions=place(cache.positions, ("batch", None)),
  )
  ids = place(jax.ShapeDtypeStruct((rows,), jnp.int32), ("batch",))
  program = jax.jit(model.decode).lower(
    model.abstract_params(), cache, ids, ids, 5
  )
  return program.compile().as_text()


def test_a_decoded_token_moves_neither_weights_nor_cache():
  """Also where four shards share two key/value heads."""
  layout = tiny.layout({"fsdp": 2, "tensor": 4}, sharding.DECODE_RULES)
  text = _compiled_decode(Model(tiny.CONFIGS["llama"], layout))
  for collective in ("all-gather(", "all-to-all(", "collective-permute("):
    assert collective not in text
  # Attention output and MLP of the one scanned block, and the embedding.
  assert text.count("all-reduce(") == 3


def test_a_token_for_experts_elsewhere_moves_alone():
  """Rows are gathered along the axis of experts, and nothing else is."""
  layout = tiny.layout(EIGHT_OF["qwen3_moe"], sharding.DECODE_RULES)
  model = Model(tiny.CONFIGS["qwen3_moe"], layout)
  text = _compiled_decode(model)
  for collective in ("all-to-all(", "collective-permute("):
    assert collective not in text
  gathered = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", text)
  assert gathered
  for shape in gathered:
    # No more than the hidden states of all rows.
    assert math.prod(map(int, shape.split(","))) <= 4 * 20


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_fewer_rows_than_shards_are_replicated(name):
  params = tiny.params(name)
  spread = Model(tiny.CONFIGS[name], tiny.layout(EIGHT_OF[name]))
  tokens, positions = tiny.joined(batch=3)
  want = jax.jit(tiny.model(name).hidden)(params, tokens, positions)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, spread.abstract_params())
  placed = jax.device_put(params, shardings)
  got = jax.jit(spread.hidden)(placed, tokens, positions)
  live = np.asarray(positions >= 0)
  np.testing.assert_allclose(
    np.asarray(got)[live], np.asarray(want)[live], atol=2e-5
  )


def test_init_makes_weights_in_their_places_whatever_the_mesh():
  spread = Model(tiny.CONFIGS["llama"], tiny.layout(EIGHT))
  params = spread.init(jax.random.key(0), "bfloat16")
  abstract = spread.abstract_params("bfloat16")

  def same_place(leaf, spec):
    assert (leaf.shape, leaf.dtype) == (spec.shape, spec.dtype)
    assert leaf.sharding == spec.sharding

  jax.tree.map(same_place, params, abstract)
  kernel = params["layers"]["mlp"]["gate"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (3, 10, 14)
  one = tiny.model("llama").init(jax.random.key(0), "bfloat16")
  _assert_trees_close(
    jax.tree.map(lambda x: np.asarray(x, np.float32), params),
    jax.tree.map(lambda x: np.asarray(x, np.float32), one),
    rtol=0,
    atol=0,
  )
  rows = np.asarray(one["embed"]["embedding"], np.float32)
  assert np.all(rows[105:] == 0)
  assert np.all(rows[:105].std(axis=1) > 0)


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_bfloat16_stays_near_float32_and_gives_float32_logits(name):
  params = tiny.params(name)
  model, half = (
    tiny.model(name),
    tiny.model(name, compute_dtype="bfloat16"),
  )
  tokens, positions = tiny.joined()
  want = jax.jit(model.hidden)(params, tokens, positions)
  got = jax.jit(half.hidden)(params, tokens, positions)
  assert got.dtype == jnp.bfloat16
  assert half.logits(params, got).dtype == jnp.float32
  live = np.asarray(positions >= 0)
  error = np.abs(np.asarray(got, np.float32) - np.asarray(want))[live]
  assert 0 < error.max() < 0.05 * np.abs(np.asarray(want)[live]).max()


def test_a_model_is_hashable_and_equal_by_value():
  assert Model(tiny.CONFIGS["llama"], tiny.layout()) == tiny.model("llama")
  assert hash(tiny.model("llama")) == hash(
    Model(tiny.CONFIGS["llama"], tiny.layout())
  )
