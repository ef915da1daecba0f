"""sft: worked numbers, the closed-form gradient, and why `train` has none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import objectives
from opd_jax.errors import InputError
from opd_jax.objectives import base, sft
from tests.objectives import support

OBJECTIVE = base.Objective.bind("sft", sft, sft.Config())


def test_worked_numbers():
  """-log p of the five tokens that carry loss, and their mean.

  Row 0: log(e^1 + e^.5 + e^-.5 + e^0) - 1 = 0.787339,
         log(e^.2 + e^-.3 + e^1.5 + e^.1) - 1.5 = 0.521426,
         log(e^0 + e^2 + e^-1 + e^.5) - 2 = 0.342350;
  row 1: log 4 = 1.386294,
         log(e^-1 + e^0 + e^1 + e^2) - 2 = 0.440190.
  """
  np.testing.assert_allclose(
    support.fixture_loss(OBJECTIVE), 3.477598 / 5, atol=1e-6
  )


def test_gradient_is_the_distribution_less_the_token():
  gradient = jax.grad(lambda z: support.fixture_loss(OBJECTIVE, z))(
    support.STUDENT_LOGITS
  )
  token = jax.nn.one_hot(support.TOKENS, 4)
  expected = (jax.nn.softmax(support.STUDENT_LOGITS, axis=-1) - token) / 5.0
  expected = jnp.where(support.MASK[..., None], expected, 0.0)
  np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_no_gradient_is_expected_on_own_samples():
  """The reason that `train` does not offer it: enumerated, not sampled."""
  logits = support.STUDENT_LOGITS[0, 0]

  def loss(logits, token):
    return support.loss_of(
      OBJECTIVE,
      {"student": logits[None, None]},
      jnp.full((1, 1), token, jnp.int32),
      jnp.ones((1, 1), bool),
      jnp.zeros((1, 1), jnp.float32),
    )[0]

  gradients = jnp.stack([jax.grad(loss)(logits, token) for token in range(4)])
  mean = jnp.sum(jax.nn.softmax(logits)[:, None] * gradients, axis=0)
  np.testing.assert_allclose(mean, np.zeros(4), atol=1e-7)
  assert jnp.max(jnp.abs(gradients)) > 0.1


def test_train_refuses_it_and_names_the_command():
  with pytest.raises(InputError, match=r"unknown objective 'sft'.*opd-jax sft"):
    objectives.create({"name": "sft"})
