"""k1, k2 and k3: worked numbers, and what is refused as a loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.errors import InputError
from opd_jax.objectives import estimators

# log student and log teacher of the drawn token at three positions.
STUDENT = jnp.array([-1.246567, -1.542536, -0.342350])
TEACHER = jnp.array([-0.514675, -0.787339, -0.787339])


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("k1", [-0.731892, -0.755197, 0.444989]),
    ("k2", [0.267833, 0.285161, 0.099008]),
    ("k3", [0.347119, 0.372834, 0.085820]),
  ],
)
def test_worked_numbers(name, expected):
  found = getattr(estimators, name)(STUDENT, TEACHER)
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_k3_is_at_least_zero_where_models_nearly_agree():
  """d^2 / 2 to first order; 1 - 1 would leave nothing of it."""
  gap = jnp.array([1e-3, -1e-3, 0.0])
  found = estimators.k3(-1.0 + gap, jnp.full((3,), -1.0))
  np.testing.assert_allclose(found, [5e-7, 5e-7, 0.0], rtol=0, atol=1e-7)
  assert np.all(found >= 0)


@pytest.mark.parametrize("name", ["k2", "k3+"])
def test_slope_of_a_loss_is_the_gap(name):
  """d k2 / d log student = log student - log teacher; "k3+" has the same."""
  slope = jax.grad(lambda s: jnp.sum(estimators.loss(name, s, TEACHER)))(
    STUDENT
  )
  np.testing.assert_allclose(slope, [-0.731892, -0.755197, 0.444989], atol=1e-6)


def test_straight_through_has_the_value_of_k3():
  np.testing.assert_allclose(
    estimators.loss("k3+", STUDENT, TEACHER),
    [0.347119, 0.372834, 0.085820],
    atol=1e-6,
  )


@pytest.mark.parametrize(
  ("name", "reason"),
  [
    ("k1", "expected gradient of k1 is 0.*opd_k1"),
    ("k3", r"that of KL\(teacher \|\| student\).*'k3\+'"),
    ("k4", r"must be one of k2, k3\+, got 'k4'"),
  ],
)
def test_what_is_no_loss_is_refused_with_the_reason(name, reason):
  with pytest.raises(InputError, match=reason):
    estimators.loss(name, STUDENT, TEACHER)
