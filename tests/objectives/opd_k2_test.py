"""opd_k2: worked numbers, closed-form gradient, and the refused estimators.

That its expected gradient is that of the reverse KL is in conformance_test.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import objectives
from opd_jax.errors import InputError
from tests.objectives import support


def _create(**options):
  return objectives.create({"name": "opd_k2", **options})


@pytest.mark.parametrize(
  ("options", "expected"),
  [
    ({}, 1.360430),
    ({"reduction": "seq_mean_token_mean"}, 1.136595),
    ({"estimator": "k3+"}, 0.572413),
  ],
)
def test_worked_numbers(options, expected):
  loss = support.fixture_loss(_create(**options))
  np.testing.assert_allclose(loss, expected, atol=1e-5)


@pytest.mark.parametrize("estimator", ["k2", "k3+"])
def test_gradient_is_the_closed_form(estimator):
  """d loss_t / dz = (s - t) (onehot(y) - p_S) / N, whatever the behavior."""
  objective = _create(estimator=estimator)
  gradient = jax.grad(lambda z: support.fixture_loss(objective, z))(
    support.STUDENT_LOGITS
  )
  # s - t of the five tokens, from the specification's A = t - s.
  gap = jnp.array([[-0.444989, -0.284610, 3.640821], [-0.185045, 0.188300, 0]])
  onehot = jnp.eye(4, dtype=jnp.float32)[support.TOKENS]
  expected = (
    gap[..., None]
    * (onehot - jax.nn.softmax(support.STUDENT_LOGITS, axis=-1))
    / 5.0
  )
  np.testing.assert_allclose(gradient, expected, atol=1e-6)
  # The same as that of opd_k1 on policy, token by token.
  np.testing.assert_allclose(
    gradient[0, 2], [-0.069978, 0.211095, -0.025743, -0.115374], atol=1e-6
  )


@pytest.mark.parametrize(
  ("options", "named"),
  [
    ({"estimator": "k1"}, "objective opd_k2: .*gradient of k1 is 0.*opd_k1"),
    ({"estimator": "k3"}, "slopes as large as teacher / student"),
    ({"estimator": "k5"}, "estimator must be one of"),
    ({"reduction": "mean"}, "reduction must be one of"),
  ],
)
def test_bad_options_are_named(options, named):
  with pytest.raises(InputError, match=named):
    _create(**options)
