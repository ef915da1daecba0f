"""The teacher reads a prompt of its own in front of the same completion."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import flops
from opd_jax.types import PromptBatch
from tests import engine
from tests.objectives import support


@functools.cache
def _case():
  """State, frozen weights, inputs with teacher prompts, one rollout."""
  step = engine.make_step()
  state, frozen = engine.make_state(step)
  inputs = engine.make_inputs()
  # Longer than the student's, so that the two windows differ.
  inputs = dataclasses.replace(
    inputs, privileged=None, teacher_prompts=inputs.privileged
  )
  rollout = jax.jit(step.rollout)(state.params, frozen, state.step, inputs)
  return state, frozen, inputs, rollout


def _evaluate(name, inputs=None, **changes):
  step = engine.make_step(name, **changes)
  state, frozen, own, rollout = _case()
  state = dataclasses.replace(state, objective=step.objective.init_state())
  batch = step.scoring_batch(rollout, own if inputs is None else inputs)
  return jax.jit(step.gradient)(state, frozen, batch), batch


_whole = functools.cache(lambda name: _evaluate(name))


def _assert_close(left, right, atol=1e-6):
  scale = max(1.0, *(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(left)))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol * scale),
    left,
    right,
  )


def _logits(model, params, prompts, batch):
  """Logits [B, T, V] of the completion tokens, from rows laid out plainly.

  Each row is its prompt, its completion right behind, then empty slots.
  """
  prompts, batch = jax.device_get((prompts, batch))
  width = prompts.tokens.shape[1] + engine.LENGTH
  ids = np.zeros((len(batch.tokens), width), np.int32)
  lengths = prompts.lengths + batch.lengths
  for row, (first, last) in enumerate(
    zip(prompts.lengths.tolist(), lengths.tolist(), strict=True)
  ):
    ids[row, :first] = prompts.tokens[row, :first]
    ids[row, first:last] = batch.tokens[row, : last - first]
  slots = np.arange(width, dtype=np.int32)[None]
  positions = np.where(slots < lengths[:, None], slots, -1)
  logits = model.logits(params, model.hidden(params, ids, positions))
  before = prompts.lengths[:, None] - 1 + np.arange(engine.LENGTH)
  before = np.minimum(before, width - 1)[:, :, None]
  found = jnp.take_along_axis(logits, before, axis=1)
  return found[:, :, : engine.STUDENT.vocab_size]


def test_the_teacher_scores_after_its_own_prompt():
  """As the bare model says of its prompt and the completion."""
  evaluation, batch = _whole("gkd")
  step = engine.make_step("gkd")
  state, frozen, _, _ = _case()

  def logprobs(role, prompts):
    params = frozen.get(role, state.params)
    logits = jax.jit(
      lambda params: _logits(step.scorer.model(role), params, prompts, batch)
    )(params)
    found = support.token_logprobs(logits, batch.tokens)
    return np.where(batch.loss_mask, found, 0.0)

  observed = evaluation.observed
  for role, prompts in (
    ("teacher", batch.teacher_prompts),
    ("student", batch.prompts),
  ):
    np.testing.assert_allclose(
      observed[role]["logprobs"], logprobs(role, prompts), atol=1e-5
    )
  # The plain prompt would have given something else.
  other = logprobs("teacher", batch.prompts)
  assert np.max(np.abs(observed["teacher"]["logprobs"] - other)) > 0.1
  again = jax.jit(step.score)(frozen, batch)
  _assert_close(again["teacher"], observed["teacher"])


def test_gradient_is_that_of_plain_autodiff():
  evaluation, batch = _whole("gkd")
  step = engine.make_step("gkd")
  state, frozen, _, _ = _case()

  def loss(params):
    teacher = _logits(
      step.scorer.teacher, frozen["teacher"], batch.teacher_prompts, batch
    )
    student = _logits(step.scorer.student, params, batch.prompts, batch)
    return support.loss_of(
      step.objective,
      {"student": student, "teacher": teacher},
      batch.tokens,
      batch.loss_mask,
      batch.behavior_logprobs,
      state={},
    )[0]

  value, gradient = jax.jit(jax.value_and_grad(loss))(state.params)
  _assert_close(sum(evaluation.losses.values()), value)
  _assert_close(evaluation.gradients, gradient)


def test_without_them_the_teacher_reads_the_students():
  """The very same program as ever, and the same figures as with a copy."""
  _, _, inputs, _ = _case()
  none = dataclasses.replace(inputs, teacher_prompts=None)
  copied = dataclasses.replace(inputs, teacher_prompts=inputs.prompts)
  plain, batch = _evaluate("opd_k1", none)
  assert batch.teacher_prompts is None
  copy, _ = _evaluate("opd_k1", copied)
  jax.tree.map(np.testing.assert_array_equal, plain, copy)
  own, _ = _whole("opd_k1")
  assert abs(plain.losses["policy"] - own.losses["policy"]) > 1e-3


@pytest.mark.parametrize("name", ["gkd", "opd_k1"])
def test_micro_batches_change_nothing(name):
  whole, _ = _whole(name)
  parts, _ = _evaluate(name, micro_batches=4)
  _assert_close(whole, parts)


def test_eight_devices_are_one():
  changes = {"mesh": {"replica": 2, "fsdp": 2, "tensor": 2}, "devices": 8}
  step = engine.make_step("gkd", **changes)
  state, frozen = engine.make_state(step)
  _, _, inputs, rollout = _case()
  found = jax.jit(step.gradient)(
    state, frozen, step.scoring_batch(jax.device_get(rollout), inputs)
  )
  _assert_close(found, _whole("gkd")[0])


def test_fused_is_split():
  step = engine.make_step("gkd")
  state, frozen, inputs, _ = _case()
  fused, metrics, rollout = jax.jit(step.train)(state, frozen, inputs)
  split_rollout = jax.jit(step.rollout)(
    state.params, frozen, state.step, inputs
  )
  np.testing.assert_array_equal(rollout.tokens, split_rollout.tokens)
  split, split_metrics = jax.jit(step.update_from)(
    state, frozen, inputs, split_rollout
  )
  _assert_close(fused.params, split.params)
  _assert_close(metrics, split_metrics, atol=1e-5)
  lengths = np.asarray(inputs.teacher_prompts.lengths)
  assert float(metrics["teacher/prompt_length_mean"]) == lengths.mean()


def test_operations_of_longer_teacher_prompts():
  """2 per weight and token, and what attention adds with its context."""
  counts = {"prompts": 4, "rows": 8, "prompt_length": 6, "completion_length": 7}

  def operations(length):
    return flops.step(
      engine.STUDENT, (engine.TEACHER,), **counts, frozen_prompt_length=length
    )

  assert operations(None) == operations(6)
  # TEACHER: 3 layers of D = 32, F = 64, 4 heads and 2 of keys, H = 8.
  weights = 3 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64)
  attended = 3 * 4 * 32 * (16 * 8 - 13 * 6.5)
  more = 8 * (3 * 2 * weights + attended)
  assert operations(9) - operations(6) == pytest.approx(more)


def test_prompts_are_repeated_for_the_rollouts():
  _, batch = _whole("gkd")
  _, _, inputs, _ = _case()
  assert isinstance(batch.teacher_prompts, PromptBatch)
  for row in range(engine.PROMPTS * engine.ROLLOUTS):
    np.testing.assert_array_equal(
      batch.teacher_prompts.tokens[row],
      inputs.teacher_prompts.tokens[row // engine.ROLLOUTS],
    )
