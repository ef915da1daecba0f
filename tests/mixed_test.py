"""Drawing from a mixture of student and teacher: what is drawn, and its weight.

On the engine's tiny pair: the teacher has more ids than the student, and more
layers.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from opd_jax import sequences
from opd_jax.config import RolloutConfig, SamplingConfig
from opd_jax.models import Model
from opd_jax.sharding import DECODE_RULES, Layout
from opd_jax.step import Step
from tests import engine

MIX, TEMPERATURE = 0.3, 0.8


def mixed(teacher_mix=MIX, name="minillm", **changes):
  step = engine.make_step(name, **changes)
  decode = Layout.create(step.scorer.student.layout.mesh, DECODE_RULES)
  sampling = SamplingConfig(
    max_new_tokens=engine.LENGTH, temperature=TEMPERATURE
  )
  return dataclasses.replace(
    step,
    teacher_decoder=Model(engine.TEACHER, decode),
    mixing=RolloutConfig(teacher_mix=teacher_mix),
    sampling=sampling,
    scorer=dataclasses.replace(step.scorer, temperature=TEMPERATURE),
  )


def draw(step, **changes):
  step = dataclasses.replace(step, **changes)
  state, frozen = engine.make_state(step)
  inputs = engine.make_inputs(privileged=False)
  return jax.jit(step.rollout)(state.params, frozen, state.step, inputs)


@functools.cache
def case():
  step = mixed()
  state, frozen = engine.make_state(step)
  return step, state, frozen, draw(step)


def probabilities(model, params, rollout):
  """Of every id at every completion token, by a forward pass of whole rows."""
  tokens, positions = sequences.join(
    rollout.prompts, rollout.tokens, rollout.sampled_mask.sum(axis=1)
  )
  logits = model.logits(params, model.hidden(params, tokens, positions))
  logits = logits[:, engine.WINDOW - 1 : -1, : engine.STUDENT.vocab_size]
  logits = np.asarray(logits, np.float64) / TEMPERATURE
  chances = np.exp(logits - logits.max(-1, keepdims=True))
  return chances / chances.sum(-1, keepdims=True)


def of_drawn(chances, rollout):
  index = np.asarray(rollout.tokens)[..., None]
  return np.take_along_axis(chances, index, axis=-1)[..., 0]


def both(step, state, frozen, rollout):
  student = probabilities(step.scorer.student, state.params, rollout)
  teacher = probabilities(step.scorer.teacher, frozen["teacher"], rollout)
  return student, teacher


def test_behavior_is_the_mixture_of_whole_forwards():
  step, state, frozen, rollout = case()
  student, teacher = both(step, state, frozen, rollout)
  mask = np.asarray(rollout.sampled_mask)
  expected = np.log(
    MIX * of_drawn(teacher, rollout) + (1 - MIX) * of_drawn(student, rollout)
  )
  np.testing.assert_allclose(
    rollout.behavior_logprobs[mask], expected[mask], atol=1e-5
  )
  # Neither model alone would have said so.
  for alone in (student, teacher):
    gap = np.log(of_drawn(alone, rollout)) - expected
    assert np.max(np.abs(gap[mask])) > 0.1


def test_tokens_are_drawn_as_often_as_the_mixture_says():
  """The first token of 4 prompts, 3000 rollouts each; 5 standard deviations."""
  count = 3000
  step = dataclasses.replace(
    mixed(), sampling=SamplingConfig(max_new_tokens=1, temperature=TEMPERATURE)
  )
  rollout = draw(step, rollouts=count)
  _, state, frozen, _ = case()
  one = jax.tree.map(lambda leaf: leaf[::count], rollout)
  student, teacher = (
    chances[:, 0] for chances in both(step, state, frozen, one)
  )
  mixture = MIX * teacher + (1 - MIX) * student
  tokens = np.asarray(rollout.tokens).reshape(engine.PROMPTS, count)

  def excess(chances):
    """Of the frequencies, in standard deviations of `chances`."""
    found = np.stack(
      [np.bincount(row, minlength=chances.shape[1]) for row in tokens]
    )
    deviation = np.sqrt(count * chances * (1 - chances))
    return np.max(np.abs(found - count * chances) / np.maximum(deviation, 1.0))

  assert excess(mixture) < 5
  assert excess(student) > 10
  assert excess(teacher) > 10


def test_without_a_share_of_the_teacher_tokens_are_the_students():
  plain = dataclasses.replace(mixed(), teacher_decoder=None)
  alone, drawn = draw(plain), draw(mixed(teacher_mix=0.0))
  np.testing.assert_array_equal(alone.tokens, drawn.tokens)
  np.testing.assert_allclose(
    alone.behavior_logprobs, drawn.behavior_logprobs, atol=1e-6
  )
  _, _, _, rollout = case()
  assert np.any(np.asarray(rollout.tokens) != np.asarray(alone.tokens))


def test_eight_devices_are_one():
  *_, rollout = case()
  mesh = {"replica": 2, "fsdp": 2, "tensor": 2}
  spread = draw(mixed(mesh=mesh, devices=8))
  np.testing.assert_array_equal(spread.tokens, rollout.tokens)
  np.testing.assert_allclose(
    spread.behavior_logprobs, rollout.behavior_logprobs, atol=1e-5
  )


@pytest.mark.parametrize("epochs", [1, 2])
def test_minillm_weighs_for_the_mixture(epochs):
  """p_student / (a p_teacher + (1 - a) p_student), of the start in all passes.

  The metrics that compare sampler and scorer have no meaning here.
  """
  step, state, frozen, rollout = case()
  step = dataclasses.replace(step, epochs=epochs)
  inputs = engine.make_inputs(privileged=False)
  after, metrics = jax.jit(step.update_from)(state, frozen, inputs, rollout)
  student, teacher = (
    of_drawn(chances, rollout) for chances in both(step, state, frozen, rollout)
  )
  weight = student / (MIX * teacher + (1 - MIX) * student)
  mask = np.asarray(rollout.sampled_mask)
  np.testing.assert_allclose(
    metrics["objective/weight"], np.mean(weight[mask]), rtol=1e-4
  )
  assert np.all(weight <= 1 / (1 - MIX))
  assert np.std(weight[mask]) > 0.1
  absent = ("mismatch/mean", "mismatch/max", "teacher/kl", "drift/kl")
  assert not metrics.keys() & set(absent)
  assert int(after.step) == 1


def test_fused_is_split():
  step, state, frozen, _ = case()
  assert isinstance(step, Step)
  inputs = engine.make_inputs(privileged=False)
  one, _, fused = jax.jit(step.train)(state, frozen, inputs)
  rollout = jax.jit(step.rollout)(state.params, frozen, state.step, inputs)
  two, _ = jax.jit(step.update_from)(state, frozen, inputs, rollout)
  np.testing.assert_array_equal(fused.tokens, rollout.tokens)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
    one.params,
    two.params,
  )


def test_the_second_decoder_counts():
  from opd_jax import memory

  plain = dataclasses.replace(mixed(), teacher_decoder=None)
  sizes = [
    {
      part.name: part.size
      for part in memory.estimate(step, engine.PROMPTS, engine.WINDOW).parts
    }
    for step in (plain, mixed())
  ]
  added = sizes[1].keys() - sizes[0].keys()
  assert "teacher: KV cache" in added
  # 3 layers x rows x 2 kv heads x slots x 8 of keys and of values, positions.
  slots = engine.PROMPTS * engine.ROLLOUTS * (engine.WINDOW + engine.LENGTH)
  assert sizes[1]["teacher: KV cache"] == slots * (3 * 2 * 8 * 2 * 4 + 4)
  # Held in its compute dtype in both layouts on one device: nothing to copy.
  assert sizes[1]["teacher: decode copy"] == 0
  spread = mixed(mesh={"fsdp": 4}, devices=4)
  found = memory.estimate(spread, engine.PROMPTS, engine.WINDOW)
  copies = {part.name: part.size for part in found.parts}
  assert copies["teacher: decode copy"] > 0
