"""The step: equal to plain autodiff, however it is cut, spread or split."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import sequences
from opd_jax.objectives import base
from opd_jax.types import STOP_ID, STOP_LENGTH
from tests import engine
from tests.objectives import support

BEHIND = 4  # A prompt id is written behind the end to see that nobody looks.


@functools.cache
def _case():
  """State, frozen weights, inputs, and one rollout, drawn on one device.

  The frozen weights are those of all roles, needed or not.
  """
  step = engine.make_step("exopd")
  state, frozen = engine.make_state(step)
  inputs = engine.make_inputs()
  rollout = jax.jit(step.rollout)(state.params, frozen, state.step, inputs)
  return state, frozen, inputs, engine.judged(rollout)


def _state_of(step):
  state, *_ = _case()
  return dataclasses.replace(state, objective=step.objective.init_state())


@functools.cache
def _evaluation(name, **changes):
  """The gradient pass of an objective on the shared rollout."""
  step = engine.make_step(name, **changes)
  _, frozen, inputs, rollout = _case()
  # Behavior apart from the student, so that ratios are not all 1.
  noise = 0.2 * jax.random.normal(jax.random.key(5), rollout.tokens.shape)
  rollout = dataclasses.replace(
    rollout,
    behavior_logprobs=rollout.behavior_logprobs
    + jnp.where(rollout.sampled_mask, noise, 0.0),
  )
  batch = step.scoring_batch(rollout, inputs)
  if step.objective.needs.student_privileged:
    assert batch.privileged is not None
  return jax.jit(step.gradient)(_state_of(step), frozen, batch), batch


def _assert_close(left, right, atol=1e-6):
  """Trees are equal to `atol`, relative to the largest entry if it is > 1."""
  scale = max(1.0, *(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(left)))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol * scale),
    left,
    right,
  )


def _naive_loss(step, params, frozen, batch, state):
  """All of [B, T, V] at once, one prompt layout, the loss straight from it."""
  logits = {}
  for role in base.ROLES:
    if role not in step.objective.needs.roles():
      continue
    prompts = (
      batch.privileged if role == "student_privileged" else batch.prompts
    )
    model = step.scorer.model(role)
    weights = frozen.get(role, params)
    tokens, positions = sequences.join(prompts, batch.tokens, batch.lengths)
    all_logits = model.logits(weights, model.hidden(weights, tokens, positions))
    first = prompts.tokens.shape[1] - 1
    part = all_logits[:, first : first + batch.tokens.shape[1]]
    logits[role] = part[..., : step.scorer.vocab_size]
  return support.loss_of(
    step.objective,
    logits,
    batch.tokens,
    batch.loss_mask,
    batch.behavior_logprobs,
    state=state.objective,
    at=step.schedule(state.step),
    group=batch.group,
    rewards=batch.rewards,
  )[0]


@pytest.mark.parametrize("name", engine.OBJECTIVES)
def test_gradient_is_that_of_plain_autodiff(name):
  evaluation, batch = _evaluation(name)
  step = engine.make_step(name)
  _, frozen, _, _ = _case()
  state = _state_of(step)
  loss, gradient = jax.jit(
    jax.value_and_grad(
      lambda params: _naive_loss(step, params, frozen, batch, state)
    )
  )(state.params)
  _assert_close(sum(evaluation.losses.values()), loss)
  _assert_close(evaluation.gradients, gradient)
  assert max(jnp.max(jnp.abs(x)) for x in jax.tree.leaves(gradient)) > 1e-3


@pytest.mark.parametrize("name", engine.OBJECTIVES)
def test_micro_batches_change_nothing(name):
  whole, _ = _evaluation(name)
  parts, _ = _evaluation(name, micro_batches=4)
  _assert_close(whole, parts)


@pytest.mark.parametrize("name", ["gkd", "three_terms", "whole_rows"])
@pytest.mark.parametrize("chunk_tokens", [1, 10**6])
def test_chunks_change_nothing(name, chunk_tokens):
  some, _ = _evaluation(name)
  other, _ = _evaluation(name, chunk_tokens=chunk_tokens)
  _assert_close(some, other)


def test_nothing_behind_a_stop_id_counts():
  step = engine.make_step()
  state, frozen, inputs, rollout = _case()
  mask = rollout.sampled_mask
  lengths = np.sum(np.asarray(mask), axis=1)
  tokens = np.asarray(rollout.tokens)
  for row, length in enumerate(lengths):
    ends = np.isin(tokens[row, :length], engine.STOP_IDS)
    stopped = rollout.stop_reason[row] == STOP_ID
    assert ends.sum() == int(stopped)
    assert bool(ends[-1]) == bool(stopped)
    assert (tokens[row, length:] == 0).all()
  assert {STOP_ID, STOP_LENGTH} == set(np.asarray(rollout.stop_reason).tolist())

  dirty = dataclasses.replace(
    rollout,
    tokens=jnp.where(mask, rollout.tokens, BEHIND),
    behavior_logprobs=jnp.where(mask, rollout.behavior_logprobs, jnp.nan),
  )
  update = jax.jit(step.update_from)
  clean_state, clean = update(state, frozen, inputs, rollout)
  dirty_state, same = update(state, frozen, inputs, dirty)
  jax.tree.map(
    np.testing.assert_array_equal, (clean_state, clean), (dirty_state, same)
  )


def test_sampler_and_scorer_agree():
  step = engine.make_step("opd_k1")
  _, frozen, inputs, rollout = _case()
  _, metrics = jax.jit(step.update_from)(
    _state_of(step), frozen, inputs, rollout
  )
  assert float(metrics["mismatch/max"]) <= 1e-5
  # On policy the loss is the sampled reverse KL itself.
  np.testing.assert_allclose(
    metrics["train/loss"], metrics["teacher/kl"], rtol=1e-5
  )


def test_fused_is_split():
  step = engine.make_step("gkd")
  state, frozen, inputs, _ = _case()
  fused = jax.jit(step.train)
  rollout_program = jax.jit(step.rollout)
  update_program = jax.jit(step.update_from)
  one, two = state, state
  for _ in range(3):
    one, metrics, fused_rollout = fused(one, frozen, inputs)
    split_rollout = rollout_program(two.params, frozen, two.step, inputs)
    two, split_metrics = update_program(two, frozen, inputs, split_rollout)
    np.testing.assert_array_equal(fused_rollout.tokens, split_rollout.tokens)
    _assert_close(one.params, two.params)
    _assert_close(metrics, split_metrics, atol=1e-5)
  assert int(one.step) == 3


def test_the_reference_is_read():
  """Its log-probabilities are those of the bare model, and they matter."""
  evaluation, batch = _evaluation("exopd")
  step = engine.make_step("exopd")
  _, frozen, *_ = _case()
  tokens, positions = sequences.join(batch.prompts, batch.tokens, batch.lengths)
  model, params = step.scorer.model("reference"), frozen["reference"]
  logits = model.logits(params, model.hidden(params, tokens, positions))
  logits = logits[:, engine.WINDOW - 1 : -1, : step.scorer.vocab_size]
  expected = support.token_logprobs(logits, batch.tokens)
  np.testing.assert_allclose(
    evaluation.observed["reference"]["logprobs"],
    jnp.where(batch.loss_mask, expected, 0.0),
    atol=1e-5,
  )
  swapped = {**frozen, "reference": jax.tree.map(jnp.negative, params)}
  other = jax.jit(step.gradient)(_state_of(step), swapped, batch)
  assert abs(other.losses["policy"] - evaluation.losses["policy"]) > 1e-3


@pytest.mark.parametrize(
  ("name", "micro_batches"),
  [
    ("gkd", 1),
    ("gkd_top_k", 2),
    ("opd_k1", 2),
    ("opd_k2", 1),
    ("distillm", 1),
    ("eopd", 2),
    ("quantile", 1),
    ("three_terms", 1),
    ("reopold", 1),
    ("reopold_refining", 2),
    ("exopd", 2),
    ("constant_negative_advantage", 1),
    ("grpo_kl", 2),
    ("aopd", 2),
    ("tropd", 2),
  ],
)
def test_eight_devices_are_one(name, micro_batches):
  _assert_eight_devices_are_one(name, micro_batches)


@pytest.mark.parametrize(
  ("name", "micro_batches"), [("two_prompts", 2), ("whole_rows", 1)]
)
def test_eight_devices_are_one_with_spread_rows(name, micro_batches):
  """Each has a part of the slots of a row; gkd is in `context_test`."""
  mesh = {"fsdp": 2, "tensor": 2, "context": 2}
  _assert_eight_devices_are_one(name, micro_batches, mesh)


def test_eight_devices_are_one_by_other_rules():
  """Weights lie along other dimensions; decoding cuts them in four."""
  wide = ["tensor", "fsdp"]
  _assert_eight_devices_are_one(
    "gkd",
    2,
    mesh={"fsdp": 2, "tensor": 2, "context": 2},
    rules={
      "train_rules": {"embed": [], "vocab": wide, "ffw": wide, "heads": wide},
      "decode_rules": {"batch": ["replica"], "ffw": wide, "heads": wide},
    },
  )


def _assert_eight_devices_are_one(name, micro_batches, mesh=None, rules=None):
  changes = {
    "mesh": mesh or {"replica": 2, "fsdp": 2, "tensor": 2},
    "devices": 8,
    "rules": rules,
    "micro_batches": micro_batches,
  }
  step = engine.make_step(name, **changes)
  state, frozen = engine.make_state(step)
  _, _, inputs, rollout = _case()
  drawn = jax.jit(step.rollout)(state.params, frozen, state.step, inputs)
  np.testing.assert_array_equal(drawn.tokens, rollout.tokens)
  np.testing.assert_allclose(
    drawn.behavior_logprobs, rollout.behavior_logprobs, atol=1e-5
  )
  one = engine.make_step(name)
  single, frozen_one, *_ = _case()
  single = dataclasses.replace(single, objective=one.objective.init_state())
  expected = jax.jit(one.gradient)(
    single, frozen_one, one.scoring_batch(rollout, inputs)
  )
  found = jax.jit(step.gradient)(
    state, frozen, step.scoring_batch(jax.device_get(rollout), inputs)
  )
  _assert_close(found, expected)


def test_a_phase_switch_does_not_recompile():
  """One compiled program before and after the switch of REOPOLD, at 5 of 10."""
  _, frozen, inputs, rollout = _case()
  step = engine.make_step("reopold")
  state = _state_of(step)
  compiled = jax.jit(step.update_from).lower(state, frozen, inputs, rollout)
  compiled = compiled.compile()
  kept = []
  for number in (4, 5):
    now = dataclasses.replace(state, step=jnp.int32(number))
    _, metrics = compiled(now, frozen, inputs, rollout)
    tokens = float(metrics["rollout/tokens"])
    kept.append(round(float(metrics["objective/kept"]) * tokens))
  assert kept[1] == 1 + int(0.2 * (tokens - 1))
  assert kept[0] > kept[1]


def test_objective_state_moves_with_the_statistics():
  step = engine.make_step("stateful")
  _, frozen, inputs, rollout = _case()
  state, metrics = jax.jit(step.update_from)(
    _state_of(step), frozen, inputs, rollout
  )
  entropy = metrics["student/entropy"]
  np.testing.assert_allclose(metrics["objective/entropy"], entropy, rtol=1e-6)
  np.testing.assert_allclose(
    state.objective["mean_entropy"], 0.5 * (1.0 + entropy), rtol=1e-6
  )


def test_loss_falls_on_a_fixed_batch():
  step = engine.make_step("gkd")
  state, frozen, inputs, rollout = _case()
  update = jax.jit(step.update_from)
  losses = []
  for _ in range(8):
    state, metrics = update(state, frozen, inputs, rollout)
    losses.append(float(metrics["train/loss"]))
  assert losses[-1] < 0.9 * losses[0], losses


def test_bfloat16_compute_keeps_float32_weights():
  """Within the rounding of bfloat16 (8 bits) of the float32 step."""
  step = engine.make_step("gkd", compute_dtype="bfloat16")
  state, frozen, inputs, rollout = _case()
  update = jax.jit(step.update_from)
  new_state, metrics = update(state, frozen, inputs, rollout)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(new_state.params)} == {
    "float32"
  }
  _, exact = jax.jit(engine.make_step("gkd").update_from)(
    state, frozen, inputs, rollout
  )
  for name in ("train/loss", "student/entropy", "optimizer/grad_norm"):
    np.testing.assert_allclose(metrics[name], exact[name], rtol=0.05)
  assert float(metrics["mismatch/max"]) > 1e-5


def test_scores_by_themselves_are_those_of_the_step():
  """The measurement of the teacher's time computes what the step computes."""
  evaluation, batch = _evaluation("gkd")
  _, frozen, *_ = _case()
  for micro_batches in (1, 4):
    step = engine.make_step("gkd", micro_batches=micro_batches)
    observed = jax.jit(step.score)(frozen, batch)
    assert observed.keys() == {"teacher"}
    _assert_close(observed["teacher"], evaluation.observed["teacher"])


def test_metrics_that_need_the_whole_distribution():
  """A filter makes the behavior another distribution than the scored one."""
  _, frozen, inputs, rollout = _case()
  step = engine.make_step("gkd")
  filtered = dataclasses.replace(
    step, sampling=dataclasses.replace(step.sampling, top_k=5)
  )
  _, pure = jax.jit(step.update_from)(_state_of(step), frozen, inputs, rollout)
  _, other = jax.jit(filtered.update_from)(
    _state_of(step), frozen, inputs, rollout
  )
  assert pure.keys() - other.keys() == {
    "mismatch/mean",
    "mismatch/max",
    "teacher/kl",
  }


def test_the_end_may_be_the_id_that_fills_slots():
  """Completions are filled with 0 behind their end; 0 ends them here too."""
  step = engine.make_step("opd_k1", stop_ids=(0,))
  state, frozen, inputs, _ = _case()
  state = dataclasses.replace(state, objective={})
  rollout_program = jax.jit(step.rollout)
  update = jax.jit(step.update_from)
  ended = 0
  for number in range(4):
    rollout = rollout_program(state.params, frozen, jnp.int32(number), inputs)
    tokens = np.asarray(rollout.tokens)
    zeros = tokens == 0
    lengths = np.where(zeros.any(1), zeros.argmax(1) + 1, engine.LENGTH)
    stopped = np.asarray(rollout.stop_reason) == STOP_ID
    np.testing.assert_array_equal(
      rollout.sampled_mask, np.arange(engine.LENGTH) < lengths[:, None]
    )
    last = tokens[np.arange(len(tokens)), lengths - 1]
    np.testing.assert_array_equal(stopped, last == 0)
    ended += stopped.sum()
    _, metrics = update(state, frozen, inputs, rollout)
    assert float(metrics["rollout/tokens"]) == lengths.sum()
    # The end itself is scored: the sampler and the scorer agree on it too.
    assert float(metrics["mismatch/max"]) <= 1e-5
    assert np.all(np.asarray(rollout.behavior_logprobs)[stopped] <= 0)
  assert ended >= 2
