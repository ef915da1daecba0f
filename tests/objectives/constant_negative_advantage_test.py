"""constant_negative_advantage: its loss, its gradient, and what it expects."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import objectives
from opd_jax.errors import InputError
from tests.objectives import support


def _create(**options):
  return objectives.create({"name": "constant_negative_advantage", **options})


def test_the_loss_is_the_mean_ratio():
  """exp(s - b) = 0.951229, 1.105171, 0.818731, 1, 1.349859; twice that."""
  loss = support.fixture_loss(_create(coefficient=2.0))
  np.testing.assert_allclose(loss, 2 * 5.224990 / 5, atol=1e-5)
  on_policy = support.fixture_loss(_create(), shift=support.NO_SHIFT)
  np.testing.assert_allclose(on_policy, 1.0, atol=1e-6)


def test_gradient_is_the_closed_form():
  """d loss_t / dz = ratio (onehot(y) - p_S) / N: every token goes down."""
  gradient = jax.grad(lambda z: support.fixture_loss(_create(), z))(
    support.STUDENT_LOGITS
  )
  onehot = jnp.eye(4, dtype=jnp.float32)[support.TOKENS]
  probabilities = jax.nn.softmax(support.STUDENT_LOGITS, axis=-1)
  ratio = jnp.where(support.MASK, jnp.exp(-support.BEHAVIOR_SHIFT), 0.0)
  np.testing.assert_allclose(
    gradient, ratio[..., None] * (onehot - probabilities) / 5.0, atol=1e-6
  )


def test_it_asks_for_no_frozen_model():
  assert _create().needs.roles() == ("student",)


@pytest.mark.parametrize(
  ("reduction", "down"), [("sum", False), ("token_mean", True)]
)
def test_expected_gradient_over_rows_that_may_end(reduction, down):
  """Token 0 ends a row of at most two: 0 in the sum, longer rows in the mean.

  The student's probability of ending at once is `p`; the gradient in its
  logit is summed over all rows, each with the probability of being drawn.
  """
  objective = _create(reduction=reduction)
  logits = jnp.array([0.3, -0.2])
  behavior_all = jax.nn.log_softmax(logits)
  total = jnp.zeros(2)
  for tokens in ((0,), (1, 0), (1, 1)):
    width = (
      jnp.zeros((1, 2), jnp.int32)
      .at[0, : len(tokens)]
      .set(jnp.array(tokens, jnp.int32))
    )
    mask = jnp.arange(2)[None] < len(tokens)
    behavior = jnp.where(mask, behavior_all[width], 0.0)
    drawn = jnp.exp(jnp.sum(behavior))

    def loss(logits, width=width, mask=mask, behavior=behavior):
      by_role = {"student": jnp.broadcast_to(logits, (1, 2, 2))}
      return support.loss_of(objective, by_role, width, mask, behavior)[0]

    total += drawn * jax.grad(loss)(logits)
  if down:
    # Descending lowers the logit of the end: rows grow longer.
    assert total[0] > 0.01
  else:
    np.testing.assert_allclose(total, np.zeros(2), atol=1e-6)


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf")])
def test_bad_coefficient(value):
  with pytest.raises(InputError, match="coefficient must be > 0 and finite"):
    _create(coefficient=value)
