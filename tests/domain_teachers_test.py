"""Several teachers, each of the rows of its sources, and one student."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import flops, memory, objectives, optim
from opd_jax.config import OptimizerConfig
from opd_jax.models import Model
from opd_jax.objectives import reduce
from opd_jax.objectives.base import Signals
from opd_jax.scoring import Scorer, bundle_scores
from opd_jax.types import PromptBatch, ScoringBatch
from tests import engine
from tests.objectives import support

# Prompts 0 and 3 are of source 0, whose teacher is the first.
SOURCES = jnp.array([0, 1, 2, 0], jnp.int32)
ROUTES = (0, 1, 1)
NAMES = ("maths", "code", "prose")


def make_step(name="gkd", routes=ROUTES, **changes):
  """The engine's step with a second teacher of another width and vocabulary."""
  step = engine.make_step(name, **changes)
  student = step.scorer.student
  second = Model(engine.REFERENCE, student.layout, student.compute_dtype)
  scorer = dataclasses.replace(
    step.scorer, other_teachers=(second,), routes=routes
  )
  return dataclasses.replace(step, scorer=scorer, sources=NAMES)


def make_state(step):
  """As the engine's; the second teacher has weights of its own."""
  state, frozen = engine.make_state(step)
  (second,) = step.scorer.other_teachers
  params = second.init(jax.random.key(2))
  params = jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf if path[-1].key == "scale" else 5.0 * leaf, params
  )
  return state, {**frozen, "teacher": (frozen["teacher"], params)}


@functools.cache
def _case():
  step = make_step()
  state, frozen = make_state(step)
  inputs = dataclasses.replace(
    engine.make_inputs(privileged=False), sources=SOURCES
  )
  rollout = jax.jit(step.rollout)(state.params, frozen, state.step, inputs)
  return state, frozen, inputs, rollout


def _evaluate(step, frozen, sources=SOURCES):
  state, _, inputs, rollout = _case()
  inputs = dataclasses.replace(inputs, sources=sources)
  batch = step.scoring_batch(rollout, inputs)
  return jax.jit(step.gradient)(state, frozen, batch)


@functools.cache
def _whole(name):
  return _evaluate(make_step(name), _case()[1])


def _alone(name, teacher):
  """A run with one of the two teachers, and no routing."""
  step = engine.make_step(name)
  routed = make_step().scorer
  (second,) = routed.other_teachers
  scorer = dataclasses.replace(
    step.scorer, teacher=(routed.teacher, second)[teacher]
  )
  frozen = {"teacher": _case()[1]["teacher"][teacher]}
  return dataclasses.replace(step, scorer=scorer), frozen


def _assert_close(left, right, atol=1e-6):
  scale = max(1.0, *(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(left)))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol * scale),
    left,
    right,
  )


# --- The worked example of the specification. ---


def test_the_worked_example_of_a_merge():
  """Row 0 scored by zT, row 1 by zB, reference zR, lam 1.25: 0.693814.

  The states are the logits themselves; the routing is the scorer's.
  """
  other = jnp.array(
    [
      [[1.6, 0.2, -0.9, 0.4], [-0.3, 0.3, 2.0, 0.1], [1.2, -1.5, 0.4, 0.1]],
      [[0.2, 0.7, -0.3, 0.5], [-0.6, 0.4, 0.6, 1.4], [0.1, 0.1, 0.0, 0.1]],
    ],
    jnp.float32,
  )
  layout = engine.make_step().scorer.student.layout

  def model(padding=0):
    """Its logits are its states; ids beyond the shared ones are likely."""
    rows = 4 + padding
    return types.SimpleNamespace(
      layout=layout,
      config=types.SimpleNamespace(vocab_size=rows, padded_vocab_size=rows),
      logits=lambda head, states: jnp.pad(
        states, ((0, 0), (0, 0), (0, padding)), constant_values=1.0
      ),
    )

  scorer = Scorer(
    student=model(),
    teacher=model(),
    other_teachers=(model(padding=2),),
    routes=(0, 1),
    reference=model(),
    vocab_size=4,
  )
  student = support.token_logprobs(support.STUDENT_LOGITS, support.TOKENS)
  batch = ScoringBatch(
    prompts=PromptBatch(
      tokens=jnp.zeros((2, 1), jnp.int32), lengths=jnp.ones(2, jnp.int32)
    ),
    tokens=support.TOKENS,
    lengths=jnp.array([3, 2], jnp.int32),
    sampled_mask=support.MASK,
    loss_mask=support.MASK,
    behavior_valid=support.MASK,
    behavior_logprobs=jnp.where(support.MASK, student, 0.0),
    group=jnp.arange(2, dtype=jnp.int32),
    sources=jnp.array([0, 1], jnp.int32),
  )
  objective = objectives.create({"name": "gopd", "lam": 1.25})
  states = {
    "student": support.STUDENT_LOGITS,
    "teacher": (support.TEACHER_LOGITS, other),
    "reference": support.REFERENCE_LOGITS,
  }
  heads = {"student": {}, "teacher": ({}, {}), "reference": {}}
  needs = objective.needs.starting_here()
  found = scorer.fields(needs, states, heads, batch)
  terms, statistics = objective.terms(
    bundle_scores(batch, found.fields, needs), Signals()
  )
  np.testing.assert_allclose(
    jnp.where(support.MASK, statistics["advantage"].loss, 0.0),
    [[0.599862, 0.392023, -4.441954], [0.175157, -0.194158, 0.0]],
    atol=1e-5,
  )
  loss = reduce.partial_sum(
    terms["policy"], support.MASK, reduce.Counts.of(support.MASK), Signals()
  )
  np.testing.assert_allclose(loss, 0.693814, atol=1e-5)
  # Only the second teacher has mass beyond: 2 e / (2 e + sum exp(zB)).
  mass = 2 * np.e / (2 * np.e + np.sum(np.exp(other[1, :2]), axis=-1))
  np.testing.assert_allclose(
    found.observed["teacher"]["masked_mass"], [[0, 0, 0], [*mass, 0]], atol=1e-6
  )


# --- The engine. ---


@pytest.mark.parametrize("name", ["gkd", "opd_k1"])
def test_two_teachers_are_two_runs_added(name):
  """Each on its own rows, by their share of the batch's tokens."""
  evaluation = _whole(name)
  state, _, inputs, rollout = _case()
  parts = []
  for teacher in (0, 1):
    step, frozen = _alone(name, teacher)
    batch = step.scoring_batch(rollout, inputs)
    mine = jnp.array(ROUTES)[batch.sources] == teacher
    rows = dataclasses.replace(batch, loss_mask=batch.loss_mask & mine[:, None])
    found = jax.jit(step.gradient)(state, frozen, rows)
    share = jnp.sum(rows.loss_mask) / jnp.sum(batch.loss_mask)
    parts.append((share, found.gradients))
  total = jax.tree.map(
    lambda one, two: parts[0][0] * one + parts[1][0] * two,
    parts[0][1],
    parts[1][1],
  )
  _assert_close(evaluation.gradients, total)
  largest = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(total))
  assert largest > 1e-3


@pytest.mark.parametrize("teacher", [0, 1])
def test_all_rows_to_one_teacher_is_a_run_with_it(teacher):
  """Bit for bit, with shapes, vocabulary and widths of its own."""
  step = make_step("gkd", routes=(teacher,) * 3)
  found = _evaluate(step, _case()[1])
  single, frozen = _alone("gkd", teacher)
  expected = _evaluate(single, frozen)
  jax.tree.map(
    np.testing.assert_array_equal, found.gradients, expected.gradients
  )
  np.testing.assert_array_equal(
    found.losses["divergence"], expected.losses["divergence"]
  )
  other = _evaluate(make_step("gkd", routes=(1 - teacher,) * 3), _case()[1])
  assert abs(other.losses["divergence"] - found.losses["divergence"]) > 1e-2


@pytest.mark.parametrize("name", ["gkd", "opd_k1_discount", "whole_rows"])
def test_micro_batches_change_nothing(name):
  parts = _evaluate(make_step(name, micro_batches=4), _case()[1])
  _assert_close(_whole(name), parts)


@pytest.mark.parametrize(("name", "micro_batches"), [("gkd", 1), ("opd_k1", 2)])
def test_eight_devices_are_one(name, micro_batches):
  step = make_step(
    name,
    mesh={"replica": 2, "fsdp": 2, "tensor": 2},
    devices=8,
    micro_batches=micro_batches,
  )
  state, frozen = make_state(step)
  _, _, inputs, rollout = _case()
  found = jax.jit(step.gradient)(
    state, frozen, step.scoring_batch(jax.device_get(rollout), inputs)
  )
  _assert_close(found, _whole(name))


def test_fused_is_split_and_each_source_has_its_figure():
  step = make_step("opd_k1")
  state, frozen, inputs, rollout = _case()
  fused, metrics, _ = jax.jit(step.train)(state, frozen, inputs)
  split, again = jax.jit(step.update_from)(state, frozen, inputs, rollout)
  _assert_close(fused.params, split.params)
  _assert_close(metrics, again, atol=1e-5)
  observed = _whole("opd_k1").observed
  gap = observed["student"]["logprobs"] - observed["teacher"]["logprobs"]
  mask = np.asarray(rollout.sampled_mask)
  rows = np.repeat(np.asarray(SOURCES), engine.ROLLOUTS)
  for index, name in enumerate(NAMES):
    own = mask & (rows == index)[:, None]
    np.testing.assert_allclose(
      metrics[f"teacher/kl/{name}"], np.mean(np.asarray(gap)[own]), atol=1e-5
    )
  none = dataclasses.replace(inputs, sources=jnp.zeros(4, jnp.int32))
  _, metrics = jax.jit(step.update_from)(state, frozen, none, rollout)
  assert np.isnan(metrics["teacher/kl/code"])
  np.testing.assert_allclose(
    metrics["teacher/kl/maths"], metrics["teacher/kl"], rtol=1e-6
  )


def test_each_source_has_its_figure_whichever_mini_batch_it_is_in():
  """Of the first update with its rows: prompt 0, 1 and 2; 3 is passed over."""
  still = OptimizerConfig(learning_rate=1e-30, weight_decay=0.0)
  step = make_step(
    "opd_k1",
    mini_batches=4,
    epochs=2,
    optimizer=optim.build(still, steps=10, updates=8),
  )
  _, frozen, inputs, rollout = _case()
  state, _ = make_state(step)
  _, metrics = jax.jit(step.update_from)(state, frozen, inputs, rollout)
  observed = _whole("opd_k1").observed
  gap = np.asarray(
    observed["student"]["logprobs"] - observed["teacher"]["logprobs"]
  )
  rows = np.arange(len(gap)) // engine.ROLLOUTS
  for prompt, name in enumerate(NAMES):
    own = np.asarray(rollout.sampled_mask) & (rows == prompt)[:, None]
    np.testing.assert_allclose(
      metrics[f"teacher/kl/{name}"], np.mean(gap[own]), atol=1e-5
    )
  assert metrics["teacher/kl"] == metrics["teacher/kl/maths"]


def test_scores_by_themselves_are_those_of_the_step():
  step = make_step("gkd")
  _, frozen, inputs, rollout = _case()
  batch = step.scoring_batch(rollout, inputs)
  found = jax.jit(step.score)(frozen, batch)
  _assert_close(found["teacher"], _whole("gkd").observed["teacher"])


def test_memory_and_operations_of_both():
  step = make_step()
  parts = {
    part.name: part.size
    for part in memory.estimate(step, engine.PROMPTS, engine.WINDOW).parts
  }
  second = _case()[1]["teacher"][1]
  assert parts["teacher 2 weights"] == sum(
    leaf.nbytes for leaf in jax.tree.leaves(second)
  )
  counts = {"prompts": 4, "rows": 8, "prompt_length": 6, "completion_length": 7}
  both = flops.step(
    engine.STUDENT, (engine.TEACHER, engine.REFERENCE), **counts
  )
  one = flops.step(engine.STUDENT, (engine.TEACHER,), **counts)
  assert both - one == flops.forward(engine.REFERENCE, 8 * 13, 6.5, 8 * 7)
