"""opd_k1: worked numbers, closed-form gradient, and the trap it avoids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import objectives
from opd_jax.errors import InputError
from opd_jax.objectives.policy import discounted_sum
from tests.objectives import support


def _create(**options):
  return objectives.create({"name": "opd_k1", **options})


@pytest.mark.parametrize(
  ("reduction", "expected"),
  [("token_mean", 0.582895), ("seq_mean_token_mean", 0.486017)],
)
def test_on_policy_loss_is_the_k1_estimate(reduction, expected):
  no_shift = jnp.zeros_like(support.BEHAVIOR_SHIFT)
  loss = support.fixture_loss(_create(reduction=reduction), shift=no_shift)
  np.testing.assert_allclose(loss, expected, atol=1e-5)


@pytest.mark.parametrize(
  ("reduction", "expected"),
  [
    ("token_mean", 0.401598),
    ("sum", 2.007989),
    ("seq_mean_token_mean", 0.306679),
  ],
)
def test_behavior_baseline_is_importance_sampling(reduction, expected):
  objective = _create(baseline="behavior", reduction=reduction)
  np.testing.assert_allclose(
    support.fixture_loss(objective), expected, atol=1e-5
  )


@pytest.mark.parametrize("baseline", ["student", "behavior"])
def test_gradient_is_the_closed_form(baseline):
  """d loss_t / dz = ratio A (p_S - onehot(y)) / N."""
  objective = _create(baseline=baseline)
  gradient = jax.grad(lambda z: support.fixture_loss(objective, z))(
    support.STUDENT_LOGITS
  )
  student = support.token_logprobs(support.STUDENT_LOGITS, support.TOKENS)
  teacher = support.token_logprobs(support.TEACHER_LOGITS, support.TOKENS)
  behavior = student + support.BEHAVIOR_SHIFT
  advantage = teacher - (behavior if baseline == "behavior" else student)
  onehot = jnp.eye(4, dtype=jnp.float32)[support.TOKENS]
  probabilities = jax.nn.softmax(support.STUDENT_LOGITS, axis=-1)
  factor = (
    jnp.exp(student - behavior) * advantage * support.MASK.astype(jnp.float32)
  )
  expected = factor[..., None] * (probabilities - onehot) / 5.0
  np.testing.assert_allclose(gradient, expected, atol=1e-6)
  if baseline == "behavior":
    np.testing.assert_allclose(
      gradient[0, 0], [-0.040950, 0.020740, 0.007630, 0.012580], atol=1e-5
    )


@pytest.mark.parametrize(
  ("discount", "expected"),
  [
    (0.5, [[-0.322911, -1.535800, -3.640821], [0.090895, -0.188300, 0.0]]),
    (1.0, [[-2.911222, -3.356211, -3.640821], [-0.003255, -0.188300, 0.0]]),
  ],
)
def test_discounted_advantage(discount, expected):
  advantage = support.token_logprobs(
    support.TEACHER_LOGITS, support.TOKENS
  ) - support.token_logprobs(support.STUDENT_LOGITS, support.TOKENS)
  sums = discounted_sum(advantage, jnp.asarray(support.MASK), discount)
  np.testing.assert_allclose(sums, expected, atol=1e-5)
  # The loss uses them: on policy it is minus their mean.
  loss = support.fixture_loss(
    _create(discount=discount), shift=jnp.zeros_like(support.BEHAVIOR_SHIFT)
  )
  np.testing.assert_allclose(loss, -np.sum(expected) / 5, atol=1e-5)


def test_expected_gradient_is_that_of_the_reverse_kl():
  """Over the drawn token, at one position: E[g] = d KL(S || T) / dz."""
  student, teacher = support.STUDENT_LOGITS[0, 2], support.TEACHER_LOGITS[0, 2]
  objective = _create(reduction="sum")
  mask = jnp.ones((1, 1), bool)

  def gradient(token):
    tokens = jnp.full((1, 1), token, jnp.int32)
    behavior = support.token_logprobs(student[None, None], tokens)

    def loss(logits):
      by_role = {"student": logits[None, None], "teacher": teacher[None, None]}
      return support.loss_of(objective, by_role, tokens, mask, behavior)[0]

    return jax.grad(loss)(student)

  probabilities = jax.nn.softmax(student)
  expected = sum(probabilities[v] * gradient(v) for v in range(4))
  np.testing.assert_allclose(
    expected, [-0.405783, 0.907196, -0.149279, -0.352134], atol=1e-5
  )


def test_advantage_is_bounded():
  objective = _create(max_advantage=0.25, reduction="sum")
  loss = support.fixture_loss(
    objective, shift=jnp.zeros_like(support.BEHAVIOR_SHIFT)
  )
  # Advantages 0.445, 0.285, -3.64, 0.185, -0.188 clipped at 0.25.
  np.testing.assert_allclose(
    loss, -(0.25 + 0.25 - 0.25 + 0.185045 - 0.188300), atol=1e-5
  )


@pytest.mark.parametrize(
  ("reduction", "expected"),
  [("token_mean", 0.404946), ("seq_mean_token_mean", 0.310864)],
)
def test_clipped_ratio(reduction, expected):
  objective = _create(
    baseline="behavior", clip_low=0.2, clip_high=0.2, reduction=reduction
  )
  np.testing.assert_allclose(
    support.fixture_loss(objective), expected, atol=1e-5
  )


def test_a_clipped_token_has_no_gradient():
  """The ratio 1.35 of a token with a positive advantage; the others count."""
  gradients = [
    jax.grad(lambda z, o=objective: support.fixture_loss(o, z))(
      support.STUDENT_LOGITS
    )
    for objective in (
      _create(baseline="behavior"),
      _create(baseline="behavior", clip_low=0.2, clip_high=0.2),
    )
  ]
  np.testing.assert_array_equal(gradients[1][1, 1], np.zeros(4))
  assert np.all(gradients[0][1, 1] != 0)
  np.testing.assert_array_equal(gradients[0][0], gradients[1][0])
  np.testing.assert_array_equal(gradients[0][1, 0], gradients[1][1, 0])


@pytest.mark.parametrize(
  ("options", "named"),
  [
    ({"discount": 1.5}, "discount must be in"),
    ({"max_advantage": 0.0}, "max_advantage must be > 0"),
    ({"coefficient": float("nan")}, "coefficient must be finite"),
    ({"reduction": "mean"}, "reduction must be one of"),
    ({"clip_low": 1.5}, "clip_low must be in .0, 1."),
    ({"clip_high": -0.1}, "clip_high must be >= 0"),
    ({"clip_high": 0.2, "dual_clip": 1.1}, "dual_clip must be > 1 .* = 1.2"),
    ({"baseline": "old"}, "objective.baseline must be one of"),
    ({"gamma": 0.5}, "unknown config key objective.gamma"),
  ],
)
def test_bad_options_are_named(options, named):
  with pytest.raises(InputError, match=named):
    _create(**options)
