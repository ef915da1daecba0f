"""minillm: worked numbers, the normalisation of advantages, weight and clip."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import objectives
from opd_jax.errors import InputError
from tests.objectives import support

# Rewards as they are, summed without a discount.
PLAIN = {"discount": 1.0, "reward_scaling": 1.0, "whiten": False}
TO_GO = np.array([[-2.911222, -3.356211, -3.640821], [-0.003255, -0.188300, 0]])
LENGTH_NORMED = np.array(
  [[-0.970407, -1.678106, -3.640821], [-0.001627, -0.188300, 0]]
)
MASK = np.asarray(support.MASK)


def _create(**options):
  return objectives.create({"name": "minillm", **options})


def _scores(needs, behavior, start=None):
  return support.scores_of(
    needs,
    {"student": support.STUDENT_LOGITS, "teacher": support.TEACHER_LOGITS},
    support.TOKENS,
    support.MASK,
    behavior,
    start=start,
  )


def _advantage(objective, start=None):
  behavior = support.token_logprobs(support.STUDENT_LOGITS, support.TOKENS)
  scores = _scores(objective.prepare_needs, behavior, start)
  signals = objective.prepare(scores, {}, support.schedule(0))
  return np.where(MASK, signals.token["advantage"], 0.0)


@pytest.mark.parametrize(
  ("options", "expected"),
  [
    ({"length_norm": False}, TO_GO),
    ({}, LENGTH_NORMED),
    ({"reward_scaling": 0.5}, 2 * LENGTH_NORMED),
    # The rewards 0.44, 0.28, -3.64, 0.19, -0.19 within 0.2.
    (
      {"length_norm": False, "max_reward": 0.2},
      [[0.2, 0.0, -0.2], [-0.003255, -0.188300, 0]],
    ),
    # Of the discount 1/2: the last two, then 0.444989 + that of the next / 2.
    (
      {"length_norm": False, "discount": 0.5},
      [[-0.322911, -1.535801, -3.640821], [0.090895, -0.188300, 0]],
    ),
  ],
)
def test_worked_advantages(options, expected):
  found = _advantage(_create(**{**PLAIN, **options}))
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_whitened_over_tokens_that_carry_loss():
  found = _advantage(_create(**{**PLAIN, "whiten": True}))
  values = LENGTH_NORMED[MASK]
  np.testing.assert_allclose(
    found[MASK], (values - values.mean()) / values.std(), atol=1e-5
  )


def test_advantages_are_of_the_start():
  """Later updates do not move them."""
  objective = _create(**PLAIN, length_norm=False)
  start = jnp.where(support.MASK, -0.5, 0.0)
  teacher = support.token_logprobs(support.TEACHER_LOGITS, support.TOKENS)
  rewards = np.where(MASK, teacher + 0.5, 0.0)
  expected = np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1]
  np.testing.assert_allclose(
    _advantage(objective, start), np.where(MASK, expected, 0), atol=1e-5
  )


def test_worked_weight_of_a_mixture():
  student, teacher = (
    jnp.exp(support.token_logprobs(logits, support.TOKENS))
    for logits in (support.STUDENT_LOGITS, support.TEACHER_LOGITS)
  )
  mixture = jnp.log(0.2 * teacher + 0.8 * student)
  objective = _create(single_step=0.0)
  scores = _scores(objective.needs, mixture)
  signals = objective.prepare(
    _scores(objective.prepare_needs, mixture), {}, support.schedule(0)
  )
  _, statistics = objective.terms(scores, signals)
  np.testing.assert_allclose(
    np.where(MASK, statistics["weight"].loss, 0),
    [[0.899204, 0.938219, 1.241856], [0.960934, 1.035547, 0]],
    atol=1e-5,
  )


@pytest.mark.parametrize("single_step", [0.0, 1.0, 0.5])
def test_loss_and_gradient_are_the_closed_form_on_policy(single_step):
  """A (p_S - onehot(y)) + c p_S (log p_S - log p_T - KL), each of 5 tokens.

  The single step's value is 0.587683, the specification's.
  """
  objective = _create(**PLAIN, single_step=single_step)
  loss, gradient = jax.value_and_grad(
    lambda z: support.fixture_loss(objective, z, shift=support.NO_SHIFT)
  )(support.STUDENT_LOGITS)
  student, teacher = (
    np.asarray(jax.nn.softmax(z, axis=-1), np.float64)
    for z in (support.STUDENT_LOGITS, support.TEACHER_LOGITS)
  )
  np.testing.assert_allclose(
    loss, -np.sum(LENGTH_NORMED) / 5 + single_step * 0.587683, atol=1e-5
  )
  onehot = np.eye(4)[np.asarray(support.TOKENS)]
  gap = np.log(student / teacher)
  divergence = np.sum(student * gap, axis=-1, keepdims=True)
  expected = LENGTH_NORMED[..., None] * (student - onehot)
  expected += single_step * student * (gap - divergence)
  expected *= MASK[..., None] / 5
  np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_the_clip_acts_on_ratio_times_weight():
  """The behavior is off by log 0.7: below 0.8 a token of A < 0 stops."""
  objective = _create(**PLAIN, single_step=0.0)
  gradient = jax.grad(
    lambda z: support.fixture_loss(
      objective, z, shift=support.NO_SHIFT - jnp.log(0.7)
    )
  )(support.STUDENT_LOGITS)
  np.testing.assert_array_equal(gradient, 0.0)
  np.testing.assert_allclose(
    support.fixture_loss(objective, shift=support.NO_SHIFT - jnp.log(0.7)),
    -0.8 * np.sum(LENGTH_NORMED) / 5,
    atol=1e-5,
  )


def test_whole_distributions_only_where_they_are_needed():
  assert not _create(single_step=0.0).needs.student.vocab_logprobs
  assert "teacher" not in _create(single_step=0.0).needs.roles()


@pytest.mark.parametrize(
  ("options", "named"),
  [
    ({"discount": 1.1}, r"discount must be in \[0, 1\], got 1.1"),
    ({"reward_scaling": 0.0}, "reward_scaling must be > 0 and finite"),
    ({"max_reward": -1.0}, "max_reward must be > 0, got -1.0; None for off"),
    ({"clip": 0.0}, r"clip must be in \(0, 1\), got 0.0"),
    ({"single_step": -1.0}, "single_step must be >= 0 and finite"),
    ({"reduction": "mean"}, "reduction must be one of"),
  ],
)
def test_bad_options_are_named(options, named):
  with pytest.raises(InputError, match=named):
    _create(**options)
