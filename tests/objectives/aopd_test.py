"""aopd: worked numbers, gradients, the ends of tau, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import objectives
from opd_jax.errors import InputError
from tests.objectives import support

GRADIENT = [
  [
    [-0.040416, 0.020470, 0.007530, 0.012416],
    [0.007675, 0.004655, -0.019274, 0.006944],
    [-0.089290, 0.099857, -0.032848, 0.022281],
  ],
  [
    [0.011565, 0.011565, 0.011565, -0.034696],
    [0.006013, -0.037871, 0.044431, -0.012573],
    [0.0, 0.0, 0.0, 0.0],
  ],
]


def _create(**options):
  return objectives.create({"name": "aopd", "top_k": 2, **options})


def _loss(objective, *arguments):
  return support.fixture_loss(objective, *arguments, shift=support.NO_SHIFT)


@pytest.mark.parametrize(
  ("options", "seq_mean", "token_mean"),
  [
    ({}, 0.117902, 0.150260),
    ({"normalization": "teacher_renormalized"}, 0.274568, 0.306287),
    ({"top_k": None}, 0.105221, 0.134301),
  ],
)
def test_worked_numbers(options, seq_mean, token_mean):
  np.testing.assert_allclose(_loss(_create(**options)), seq_mean, atol=1e-5)
  np.testing.assert_allclose(
    _loss(_create(**options, reduction="token_mean")), token_mean, atol=1e-5
  )


@pytest.mark.parametrize(
  ("tau", "expected"),
  [
    (-1.0, 0.486017),  # opd_k1
    (1.0, 0.348290),  # gkd with beta 0
    # teacher - student = 0.255, 0.195, -0.69, 0.051, -0.11: the fourth too.
    (
      0.1,
      ((-0.444989 - 0.284610 + 1.481469) / 3 + (0.104971 + 0.104682) / 2) / 2,
    ),
  ],
)
def test_tau(tau, expected):
  loss = _loss(_create(top_k=None, tau=tau))
  np.testing.assert_allclose(loss, expected, atol=1e-5)


def test_gradient():
  gradient = jax.grad(lambda z: _loss(_create(), z))(support.STUDENT_LOGITS)
  np.testing.assert_allclose(gradient, GRADIENT, atol=1e-5)


def test_gradient_is_the_closed_form():
  """ratio A (p_S - onehot(y)), or p_S m_T - p_T on the teacher's two ids."""
  objective = _create(reduction="sum")
  gradient = jax.grad(lambda z: support.fixture_loss(objective, z))(
    support.STUDENT_LOGITS
  )
  student, teacher = (
    jax.nn.softmax(logits, axis=-1)
    for logits in (support.STUDENT_LOGITS, support.TEACHER_LOGITS)
  )
  onehot = jnp.eye(4, dtype=jnp.float32)[support.TOKENS]
  gap = jnp.log(jnp.sum(onehot * teacher, -1) / jnp.sum(onehot * student, -1))
  rank = jnp.argsort(jnp.argsort(-teacher, axis=-1), axis=-1)
  inside = jnp.where(rank < 2, teacher, 0.0)
  pushed = (jnp.exp(-support.BEHAVIOR_SHIFT) * gap)[..., None] * (
    student - onehot
  )
  followed = student * jnp.sum(inside, -1, keepdims=True) - inside
  expected = jnp.where((gap <= 0)[..., None], followed, pushed)
  np.testing.assert_allclose(
    gradient, jnp.where(support.MASK[..., None], expected, 0.0), atol=1e-6
  )


def test_equal_models_have_no_gradient():
  gradient = jax.grad(
    lambda z: support.fixture_loss(
      _create(top_k=None), z, teacher=support.STUDENT_LOGITS
    )
  )(support.STUDENT_LOGITS)
  np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


@pytest.mark.parametrize(
  ("options", "named"),
  [
    ({"tau": 1.5}, "tau must be in .-1, 1."),
    ({"top_k": 0}, "needs top_k >= 1.*; set top_k=None for all"),
    ({"top_k": 1, "normalization": "renormalized"}, "top_k = 1"),
    ({"normalization": "clamped"}, "objective.normalization must be one of"),
  ],
)
def test_bad_options_are_named(options, named):
  with pytest.raises(InputError, match=named):
    _create(**options)


def test_more_ids_than_there_are():
  with pytest.raises(
    InputError, match=r"aopd: top_k must .*; set top_k=None for all"
  ):
    objectives.create({"name": "aopd"}).check_vocabulary(61)
