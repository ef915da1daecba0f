"""Whole steps with a mixture of experts or a Gemma 2 as student."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.models import Experts
from tests import engine
from tests.models import tiny

STUDENTS = {
  "qwen3_moe": dataclasses.replace(
    engine.STUDENT,
    family="qwen3_moe",
    experts=Experts(count=4, per_token=2, size=24, renormalize=True),
  ),
  "gemma2": dataclasses.replace(
    tiny.CONFIGS["gemma2"], vocab_size=engine.STUDENT.vocab_size
  ),
}
TEACHER = dataclasses.replace(tiny.CONFIGS["gemma3"], hidden_size=24)
MESHES = {
  "one": {},
  "eight": {
    "mesh": {"fsdp": 2, "tensor": 2, "expert": 2},
    "devices": 8,
    "micro_batches": 2,
  },
}


@functools.cache
def _run(name, mesh):
  step = engine.make_step("gkd", **MESHES[mesh])
  of = lambda model, config: dataclasses.replace(model, config=config)
  step = dataclasses.replace(
    step,
    decoder=of(step.decoder, STUDENTS[name]),
    scorer=dataclasses.replace(
      step.scorer,
      student=of(step.scorer.student, STUDENTS[name]),
      teacher=of(step.scorer.teacher, TEACHER),
    ),
  )
  state, frozen = engine.make_state(step)
  inputs = engine.make_inputs(privileged=False)
  rollout = jax.jit(step.rollout)(state.params, frozen, state.step, inputs)
  batch = step.scoring_batch(rollout, inputs)
  return rollout, batch, jax.jit(step.gradient)(state, frozen, batch)


@pytest.mark.parametrize("name", STUDENTS)
def test_sampler_and_scorer_agree(name):
  _, batch, evaluation = _run(name, "one")
  gap = evaluation.observed["student"]["logprobs"]
  gap = jnp.abs(gap - batch.behavior_logprobs)
  valid = batch.behavior_valid
  assert jnp.sum(valid) > 20
  assert jnp.max(jnp.where(valid, gap, 0.0)) <= 1e-5


def test_eight_devices_draw_and_learn_what_one_does():
  """With experts, rows, heads and widths spread; and with micro-batches."""
  rollout, _, one = _run("qwen3_moe", "one")
  spread, _, eight = _run("qwen3_moe", "eight")
  np.testing.assert_array_equal(spread.tokens, rollout.tokens)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    jax.device_get((eight.gradients, eight.losses)),
    jax.device_get((one.gradients, one.losses)),
  )
  router = one.gradients["layers"]["mlp"]["router"]["kernel"]
  assert jnp.all(jnp.max(jnp.abs(router), axis=(0, 1)) > 0)
