"""gopd and exopd: worked numbers, gradients, target, equality at lam = 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import objectives
from opd_jax.errors import InputError
from tests.objectives import support

TEACHER_BASE_LOGITS = jnp.array(
  [
    [[1.6, 0.2, -0.9, 0.4], [-0.3, 0.3, 2.0, 0.1], [1.2, -1.5, 0.4, 0.1]],
    [[0.2, 0.7, -0.3, 0.5], [-0.6, 0.4, 0.6, 1.4], [0.1, 0.1, 0.0, 0.1]],
  ],
  jnp.float32,
)
WEIGHTED_GRADIENT = [
  [
    [-0.062190, 0.031498, 0.011587, 0.019104],
    [0.014020, 0.008503, -0.035208, 0.012685],
    [-0.069900, 0.210860, -0.025715, -0.115245],
  ],
  [
    [0.010378, 0.010378, 0.010378, -0.031133],
    [-0.001241, -0.003373, -0.009168, 0.013781],
    [0.0, 0.0, 0.0, 0.0],
  ],
]


def _create(name="gopd", **options):
  return objectives.create({"name": name, **options})


def _loss(objective, *arguments, reference=support.REFERENCE_LOGITS, **options):
  return support.fixture_loss(
    objective, *arguments, reference=reference, **options
  )


@pytest.mark.parametrize(
  ("lam", "token_mean", "seq_mean"),
  [
    (0.0, 0.205783, 0.194242),
    (0.5, 0.394339, 0.340130),
    (1.0, 0.582895, 0.486017),
    (1.25, 0.677174, 0.558961),
    (1.5, 0.771452, 0.631905),
  ],
)
def test_worked_numbers(lam, token_mean, seq_mean):
  for reduction, expected in (
    ("token_mean", token_mean),
    ("seq_mean_token_mean", seq_mean),
  ):
    objective = _create(lam=lam, max_weight=None, reduction=reduction)
    np.testing.assert_allclose(_loss(objective), expected, atol=1e-5)
    # On policy the weight is 1.
    weighted = _create(lam=lam, reduction=reduction)
    np.testing.assert_allclose(
      _loss(weighted, shift=support.NO_SHIFT), expected, atol=1e-5
    )


@pytest.mark.parametrize(
  ("reduction", "expected"),
  [("token_mean", 0.523772), ("seq_mean_token_mean", 0.435306)],
)
def test_weighted_for_the_sampler(reduction, expected):
  objective = _create("exopd", reduction=reduction)
  np.testing.assert_allclose(_loss(objective), expected, atol=1e-5)


def test_without_the_weight_sampling_must_be_pure():
  assert _create(max_weight=None).needs.pure_sampling
  assert not _create("exopd").needs.pure_sampling


def test_the_weight_is_truncated():
  """At 1.1: 0.951229, 1.1, 0.818731, 1, 1.1 instead of up to 1.349859."""
  advantages = np.array([0.599862, 0.392023, -4.441954, 0.207554, -0.143353])
  weights = np.array([0.951229, 1.1, 0.818731, 1.0, 1.1])
  np.testing.assert_allclose(
    _loss(_create("exopd", max_weight=1.1)),
    -np.sum(advantages * weights) / 5,
    atol=1e-5,
  )


def test_gradient():
  gradient = jax.grad(lambda z: _loss(_create("exopd"), z))(
    support.STUDENT_LOGITS
  )
  np.testing.assert_allclose(gradient, WEIGHTED_GRADIENT, atol=1e-5)


def test_gradient_is_the_closed_form():
  """d loss_t / dz = w A (p_S - onehot(y)) / N."""
  lam = 0.5
  gradient = jax.grad(lambda z: _loss(_create(lam=lam), z))(
    support.STUDENT_LOGITS
  )
  student, teacher, reference = (
    support.token_logprobs(logits, support.TOKENS)
    for logits in (
      support.STUDENT_LOGITS,
      support.TEACHER_LOGITS,
      support.REFERENCE_LOGITS,
    )
  )
  advantage = lam * (teacher - reference) - (student - reference)
  weight = jnp.exp(-support.BEHAVIOR_SHIFT)
  onehot = jnp.eye(4, dtype=jnp.float32)[support.TOKENS]
  probabilities = jax.nn.softmax(support.STUDENT_LOGITS, axis=-1)
  factor = jnp.where(support.MASK, weight * advantage / 5.0, 0.0)
  np.testing.assert_allclose(
    gradient, factor[..., None] * (probabilities - onehot), atol=1e-6
  )


def test_reward_correction_takes_the_teachers_base():
  loss = _loss(
    _create("exopd"), shift=support.NO_SHIFT, reference=TEACHER_BASE_LOGITS
  )
  np.testing.assert_allclose(loss, 0.599544, atol=1e-5)


def test_the_gap_is_bounded():
  """sT - sR = 0.62, 0.43, -3.2, 0.09, 0.18 at (0, 0) to (1, 1), bound 0.5."""
  gaps = np.array([0.619491, 0.429652, -3.204529, 0.090036, 0.179786])
  before = np.array([0.444989, 0.284610, -3.640821, 0.185045, -0.188300])
  loss = _loss(_create("exopd", max_gap=0.5), shift=support.NO_SHIFT)
  expected = before + 0.25 * np.clip(gaps, -0.5, 0.5)
  np.testing.assert_allclose(loss, -np.mean(expected), atol=1e-5)


def test_without_extrapolation_it_is_opd_k1_bit_for_bit():
  """And asks for no reference, whose pass would be for nothing."""
  gopd, opd_k1 = _create(lam=1.0), objectives.create({"name": "opd_k1"})
  assert "reference" not in gopd.needs.roles()
  assert "reference" in _create("exopd").needs.roles()
  one, other = (
    jax.value_and_grad(lambda z, o=objective: support.fixture_loss(o, z))(
      support.STUDENT_LOGITS
    )
    for objective in (gopd, opd_k1)
  )
  jax.tree.map(np.testing.assert_array_equal, one, other)


def test_expected_gradient_leads_to_the_tilted_target():
  """Over the token, at (0, 0): 0 at softmax(1.25 lT - 0.25 lR), eq. 12."""
  target = jnp.array([0.768803, 0.066343, 0.024406, 0.140448])
  objective = _create("exopd", reduction="sum")
  mask = jnp.ones((1, 1), bool)

  def gradient(logits, token):
    tokens = jnp.full((1, 1), token, jnp.int32)
    behavior = support.token_logprobs(logits[None, None], tokens)

    def loss(logits):
      by_role = {
        "student": logits[None, None],
        "teacher": support.TEACHER_LOGITS[:1, :1],
        "reference": support.REFERENCE_LOGITS[:1, :1],
      }
      return support.loss_of(objective, by_role, tokens, mask, behavior)[0]

    return jax.grad(loss)(logits)

  def expected(logits):
    probabilities = jax.nn.softmax(logits)
    return sum(probabilities[v] * gradient(logits, v) for v in range(4))

  np.testing.assert_allclose(expected(jnp.log(target)), np.zeros(4), atol=1e-5)
  at_teacher = expected(support.TEACHER_LOGITS[0, 0])
  assert jnp.max(jnp.abs(at_teacher)) > 0.01


@pytest.mark.parametrize(
  ("name", "options", "named"),
  [
    ("gopd", {"lam": -0.5}, "lam must be >= 0"),
    ("gopd", {"lam": float("inf")}, "lam must be >= 0 and finite"),
    ("gopd", {"max_weight": 0.0}, "max_weight must be > 0"),
    ("gopd", {"max_gap": -1.0}, "max_gap must be > 0"),
    ("exopd", {"lam": 1.0}, "lam must be > 1, got 1.0; objective gopd"),
  ],
)
def test_bad_options_are_named(name, options, named):
  with pytest.raises(InputError, match=named):
    _create(name, **options)
