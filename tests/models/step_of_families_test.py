"""A whole step with a mixture of experts as student, a Gemma as teacher."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.models import Experts
from tests import engine
from tests.models import tiny

STUDENT = dataclasses.replace(
  engine.STUDENT,
  family="qwen3_moe",
  experts=Experts(count=4, per_token=2, size=24, renormalize=True),
)
TEACHER = dataclasses.replace(
  tiny.CONFIGS["gemma3"], hidden_size=24, max_positions=128
)
MESHES = {
  "one": {},
  "eight": {
    "mesh": {"fsdp": 2, "tensor": 2, "expert": 2},
    "devices": 8,
    "micro_batches": 2,
  },
}


def _step(mesh):
  step = engine.make_step("gkd", **MESHES[mesh])
  with_config = lambda model, config: dataclasses.replace(model, config=config)
  return dataclasses.replace(
    step,
    decoder=with_config(step.decoder, STUDENT),
    scorer=dataclasses.replace(
      step.scorer,
      student=with_config(step.scorer.student, STUDENT),
      teacher=with_config(step.scorer.teacher, TEACHER),
    ),
  )


def _run(mesh):
  step = _step(mesh)
  state, frozen = engine.make_state(step)
  inputs = engine.make_inputs(privileged=False)
  rollout = jax.jit(step.rollout)(state.params, frozen, state.step, inputs)
  batch = step.scoring_batch(rollout, inputs)
  return rollout, jax.jit(step.gradient)(state, frozen, batch)


def test_eight_devices_draw_and_learn_what_one_does():
  """Also: what the sampler says of its tokens is what the scorer says."""
  rollout, one = _run("one")
  spread, eight = _run("eight")
  np.testing.assert_array_equal(spread.tokens, rollout.tokens)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    jax.device_get((eight.gradients, eight.losses)),
    jax.device_get((one.gradients, one.losses)),
  )
  router = one.gradients["layers"]["mlp"]["router"]["kernel"]
  assert jnp.all(jnp.max(jnp.abs(router), axis=(0, 1)) > 0)
