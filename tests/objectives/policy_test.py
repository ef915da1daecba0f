"""The policy-gradient core: each bound, on both sides and by its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.objectives import policy

RATIOS = jnp.array([[0.5, 0.9, 1.0, 1.25, 4.0]])


def _loss_and_slope(advantage, **bounds):
  """Losses of `RATIOS` and their derivatives in the ratio."""
  advantages = jnp.full_like(RATIOS, advantage)
  loss, pull = jax.vjp(
    lambda ratios: policy.surrogate(ratios, advantages, **bounds), RATIOS
  )
  (slope,) = pull(jnp.ones_like(loss))
  return loss[0], slope[0]


@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_without_bounds(advantage):
  loss, slope = _loss_and_slope(advantage)
  np.testing.assert_array_equal(loss, -advantage * RATIOS[0])
  np.testing.assert_array_equal(slope, np.full(5, -advantage))


@pytest.mark.parametrize(
  ("advantage", "bounds", "losses", "slopes"),
  [
    # Up: only what is already too far up stops.
    (2.0, (0.2, 0.3, None), [-1, -1.8, -2, -2.5, -2.6], [-2, -2, -2, -2, 0]),
    # Down: only what is already too far down stops.
    (-2.0, (0.2, 0.3, None), [1.6, 1.8, 2, 2.5, 8], [0, 2, 2, 2, 2]),
    # One side alone.
    (2.0, (0.2, None, None), [-1, -1.8, -2, -2.5, -8], [-2] * 5),
    (-2.0, (None, 0.3, None), [1, 1.8, 2, 2.5, 8], [2] * 5),
    # The dual clip bounds the loss of a token pushed down from far above.
    (-2.0, (0.2, 0.3, 3.0), [1.6, 1.8, 2, 2.5, 6], [0, 2, 2, 2, 0]),
    (2.0, (None, None, 3.0), [-1, -1.8, -2, -2.5, -8], [-2] * 5),
  ],
)
def test_bounds(advantage, bounds, losses, slopes):
  low, high, dual = bounds
  loss, slope = _loss_and_slope(
    advantage, clip_low=low, clip_high=high, dual_clip=dual
  )
  np.testing.assert_allclose(loss, losses, rtol=1e-6)
  np.testing.assert_array_equal(slope, slopes)
