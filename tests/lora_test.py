"""Adapters: their gradient, the step, and what of the program they change."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import memory, parsing
from opd_jax.config import LoraConfig, RunConfig, SftConfig
from opd_jax.errors import InputError
from opd_jax.models import Experts, Lora, Model, lora
from tests import engine
from tests.models import tiny

STUDENTS = {
  "qwen3": engine.STUDENT,
  "qwen3_moe": dataclasses.replace(
    engine.STUDENT,
    family="qwen3_moe",
    tie_embeddings=False,
    experts=Experts(count=4, per_token=2, size=24, renormalize=True),
  ),
}
# One whose terms are pointwise, and one of whole rows.
OBJECTIVES = {"qwen3": "gkd", "qwen3_moe": "whole_rows"}
EIGHT = {"mesh": {"fsdp": 2, "tensor": 2, "expert": 2}, "devices": 8}
RANK, ALPHA = 3, 6.0


def lora_of(config, targets=("all-linear",), rank=RANK):
  return Lora.of(LoraConfig(rank=rank, alpha=ALPHA, targets=targets), config)


def spread(params, seed, size):
  """Random values of the same shapes and places; never 0."""
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  return jax.tree.unflatten(
    tree,
    [
      jax.device_put(size * jax.random.normal(key, leaf.shape), leaf.sharding)
      for key, leaf in zip(keys, leaves, strict=True)
    ],
  )


@functools.cache
def case(student="qwen3", adapted=True, **changes):
  """A step, its state and the frozen weights; the student's are the same."""
  changes = {**(EIGHT if changes.pop("eight", False) else {}), **changes}
  step = engine.make_step(OBJECTIVES[student], **changes)
  config = STUDENTS[student]
  adapters = lora_of(config)
  of = lambda model: dataclasses.replace(
    model, config=config, lora=adapters if adapted else None
  )
  step = dataclasses.replace(
    step,
    decoder=of(step.decoder),
    scorer=dataclasses.replace(step.scorer, student=of(step.scorer.student)),
  )
  state, frozen = engine.make_state(
    dataclasses.replace(
      step, scorer=dataclasses.replace(step.scorer, student=plain(step))
    )
  )
  if not adapted:
    return step, state, frozen
  model = step.scorer.student
  trained = spread(model.init_adapters(jax.random.key(0)), 3, 0.2)
  return step, step.place_state(trained), {**frozen, "base": state.params}


def plain(step):
  return dataclasses.replace(step.scorer.student, lora=None)


def whole(state, frozen):
  return lora.combine(frozen["base"], state.params)


@functools.cache
def drawn(student, eight=False):
  step, state, frozen = case(student, eight=eight)
  inputs = engine.make_inputs(privileged=False)
  return jax.jit(step.rollout)(state.params, frozen, state.step, inputs)


@functools.cache
def learned(student, eight=False, **changes):
  step, state, frozen = case(student, eight=eight, **changes)
  inputs = engine.make_inputs(privileged=False)
  rollout = jax.device_get(drawn(student))
  batch = step.scoring_batch(rollout, inputs)
  return jax.jit(step.gradient)(state, frozen, batch), batch


def at(tree, *path):
  return functools.reduce(lambda node, key: node[key], path, tree)


@pytest.mark.parametrize("student", STUDENTS)
def test_the_gradient_is_that_of_the_merged_weights(student):
  """dL/dA = s (dL/dW) B' and dL/dB = s A' (dL/dW), from a full training."""
  got, batch = learned(student)
  step, state, frozen = case(student)
  model = step.scorer.student
  merged = jax.jit(model.working_copy)(whole(state, frozen))
  full, full_state, full_frozen = case(student, adapted=False)
  full_state = dataclasses.replace(full_state, params=merged)
  want = jax.jit(full.gradient)(full_state, full_frozen, batch)
  for name, loss in want.losses.items():
    np.testing.assert_allclose(got.losses[name], loss, rtol=1e-6, atol=1e-6)
  targets = model.lora.kernels
  assert len(targets) == (7 if student == "qwen3" else 4)
  scale = ALPHA / RANK
  for path in targets:
    *place, _ = path.split(".")
    slope = np.asarray(at(want.gradients, *place, "kernel"), np.float64)
    pair = at(state.params, *place, "adapter")
    a, b = (np.asarray(pair[key], np.float64) for key in "ab")
    layers, inputs = slope.shape[0], int(np.prod(a.shape[1:-1]))
    slope = slope.reshape(layers, inputs, -1)
    a, b = a.reshape(layers, inputs, RANK), b.reshape(layers, RANK, -1)
    found = at(got.gradients, *place, "adapter")
    for key, expected in (
      ("a", scale * slope @ b.swapaxes(1, 2)),
      ("b", scale * a.swapaxes(1, 2) @ slope),
    ):
      assert np.abs(expected).max() > 1e-4
      shaped = expected.reshape(found[key].shape)
      np.testing.assert_allclose(found[key], shaped, rtol=1e-4, atol=1e-6)


def test_nothing_else_has_a_gradient():
  """The state, the optimizer and the loops hold none of a whole weight."""
  step, state, frozen = case()
  _, batch = learned("qwen3")
  names = jax.tree.leaves(
    jax.tree.map_with_path(
      lambda path, _: [key.key for key in path][-2:], state.params
    ),
    is_leaf=lambda node: isinstance(node, list),
  )
  assert {tuple(name) for name in names} == {("adapter", "a"), ("adapter", "b")}
  trained = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  moments = sum(leaf.size for leaf in jax.tree.leaves(state.optimizer))
  assert 2 * trained <= moments <= 2 * trained + 4
  shape = frozen["base"]["embed"]["embedding"].shape

  def of_that_shape(step, state, frozen):
    program = jax.make_jaxpr(step.gradient)(state, frozen, batch)
    return str(program).count(f"f32[{shape[0]},{shape[1]}] = add")

  assert of_that_shape(step, state, frozen) == 0
  assert of_that_shape(*case(adapted=False)) > 0


def test_sampler_and_scorer_agree():
  """Merged weights draw, unmerged ones score."""
  for student in STUDENTS:
    evaluation, batch = learned(student)
    gap = evaluation.observed["student"]["logprobs"] - batch.behavior_logprobs
    assert jnp.sum(batch.behavior_valid) > 20
    assert jnp.max(jnp.where(batch.behavior_valid, jnp.abs(gap), 0.0)) <= 1e-5


def test_eight_devices_and_micro_batches_learn_what_one_does():
  one, _ = learned("qwen3_moe")
  eight, _ = learned("qwen3_moe", eight=True, micro_batches=2)
  np.testing.assert_array_equal(
    drawn("qwen3_moe", eight=True).tokens, drawn("qwen3_moe").tokens
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    jax.device_get((eight.gradients, eight.losses)),
    jax.device_get((one.gradients, one.losses)),
  )


def test_new_adapters_are_the_same_on_every_mesh_and_add_nothing():
  step, _, frozen = case("qwen3_moe")
  one = step.scorer.student.init_adapters(jax.random.key(5))
  eight = case("qwen3_moe", eight=True)[0].scorer.student
  jax.tree.map(
    np.testing.assert_array_equal, one, eight.init_adapters(jax.random.key(5))
  )
  query = one["layers"]["attention"]["query"]["adapter"]
  bound = 1 / np.sqrt(engine.STUDENT.hidden_size)
  assert 0.9 * bound < jnp.max(jnp.abs(query["a"])) <= bound
  assert not np.any(query["b"])
  start = jax.jit(step.decoder.working_copy)(lora.combine(frozen["base"], one))
  jax.tree.map(np.testing.assert_array_equal, start, frozen["base"])


@pytest.mark.parametrize("name", ["llama_biases", "gemma2", "qwen3_moe"])
def test_adapters_of_full_rank_are_any_change_of_the_kernels(name):
  """With A = 1 the product is that of W + scale B, whatever B."""
  config, base = tiny.CONFIGS[name], tiny.params(name)
  wide = lora_of(config, ("q_proj",), rank=config.hidden_size)
  model = Model(config, tiny.layout(), lora=wide)
  a, b = (
    model.abstract_trained()["layers"]["attention"]["query"]["adapter"][key]
    for key in "ab"
  )
  change = 0.3 * jax.random.normal(jax.random.key(1), b.shape)
  adapter = {"a": jnp.broadcast_to(jnp.eye(a.shape[-1]), a.shape), "b": change}
  changed = jax.tree.map_with_path(
    lambda path, leaf: (
      leaf + wide.scale * change
      if jax.tree_util.keystr(path, simple=True, separator=".") in wide.kernels
      else leaf
    ),
    base,
  )
  whole = lora.combine(
    base, {"layers": {"attention": {"query": {"adapter": adapter}}}}
  )
  tokens, positions = tiny.joined()

  @jax.jit
  def logits(params):
    states = model.hidden(params, tokens, positions)
    return model.logits(params, states)[..., : config.vocab_size]

  want, live = logits(changed), positions >= 0
  assert jnp.max(jnp.abs(want - logits(base))[live]) > 0.5
  np.testing.assert_allclose(logits(whole)[live], want[live], atol=1e-4)


def test_fused_is_split_and_the_base_keeps_its_bits():
  step, state, frozen = case()
  before = jax.device_get(frozen["base"])
  inputs = engine.make_inputs(privileged=False)
  one, metrics, rollout = jax.jit(step.train)(state, frozen, inputs)
  split = jax.device_get(drawn("qwen3"))
  two, split_metrics = jax.jit(step.update_from)(state, frozen, inputs, split)
  np.testing.assert_array_equal(rollout.tokens, split.tokens)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    (one.params, metrics),
    (two.params, split_metrics),
  )
  jax.tree.map(np.testing.assert_array_equal, before, frozen["base"])
  for leaf, old in zip(*map(jax.tree.leaves, (one, state)), strict=True):
    assert leaf.size == 1 or np.any(leaf != old)


def test_several_updates_per_rollout_batch_trace():
  """The scoring before the updates and the scan over them see the base."""
  step, state, frozen = case()
  step = dataclasses.replace(
    step,
    objective=engine.objective_of("minillm"),
    mini_batches=2,
    epochs=2,
    micro_batches=2,
  )
  assert step.scores_start
  inputs = engine.make_inputs(privileged=False)
  after, metrics, _ = jax.eval_shape(step.train, state, frozen, inputs)
  assert "drift/kl" in metrics
  jax.tree.map(
    lambda old, new: np.testing.assert_equal(old.shape, new.shape), state, after
  )


def test_memory_counts_the_base_and_the_adapters():
  step, state, frozen = case("qwen3_moe", eight=True)
  first = lambda tree: sum(
    leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree)
  )
  counted = memory.estimate(step, 8, engine.WINDOW)
  parts = {part.name: part for part in counted.parts}
  assert parts["student weights"].size == first(frozen["base"])
  assert parts["adapters"].size == first(state.params)
  assert parts["optimizer state"].size == first((state.optimizer, state.step))
  assert parts["gradients"].size == first(state.params)
  shared = memory.estimate(step, 8, engine.WINDOW, shared=["teacher"])
  saved = counted.resident - shared.resident
  assert saved == parts["teacher weights"].size


def test_targets_that_there_are_not():
  of = lambda name, *targets: lora_of(tiny.CONFIGS[name], targets)
  assert of("llama", "v_proj", "q_proj").targets == ("q_proj", "v_proj")
  assert of("qwen3_moe", "all-linear").targets == (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
  )
  with pytest.raises(InputError, match=r"'up_proj' .*experts .*o_proj"):
    of("qwen3_moe", "q_proj", "up_proj")
  with pytest.raises(InputError, match=r"'lm_head' .*down_proj"):
    of("llama", "lm_head")


@pytest.mark.parametrize(
  ("cls", "values", "words"),
  [
    (LoraConfig, {"rank": 0}, "student.lora.rank must be >= 1, got 0"),
    (LoraConfig, {"alpha": 0.0}, "student.lora.alpha must be > 0"),
    (LoraConfig, {"targets": ()}, "different names of products"),
    (LoraConfig, {"targets": ("q_proj", "q_proj")}, "different names"),
    (LoraConfig, {"targets": ("all-linear", "q_proj")}, "stands alone"),
    (RunConfig, {"student": {"path": "x", "lora": {"r": 4}}}, "lora.r;"),
    (
      SftConfig,
      {"student": {"path": "x", "init": "random", "lora": {}}},
      "adapters of weights that are random",
    ),
  ],
)
def test_configs_that_make_no_sense(cls, values, words):
  with pytest.raises(InputError, match=words):
    parsing.parse(cls, values)
