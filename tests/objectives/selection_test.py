"""Tokens by rank: the count, ties, padding, signs, and many devices."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from opd_jax.objectives.selection import top_fraction
from opd_jax.sharding import make_mesh

top = jax.jit(top_fraction, static_argnums=2)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.2, 0.29, 0.4, 0.57, 0.7, 1.0])
@pytest.mark.parametrize("total", [1, 2, 6, 11, 100, 101])
def test_the_largest_are_chosen_and_counted(fraction, total):
  """1 + floor(fraction (n - 1)), the product without rounding."""
  rng = np.random.default_rng(total)
  values = rng.normal(size=(8, 16)).astype(np.float32)
  order = rng.permutation(128)
  mask = np.zeros(128, bool)
  mask[order[:total]] = True
  mask = mask.reshape(8, 16)
  values = np.where(mask, values, np.nan)
  chosen = np.asarray(top(values, mask, fraction))
  count = 1 + int(Fraction(str(fraction)) * (total - 1))
  assert chosen.sum() == count
  assert not np.any(chosen & ~mask)
  expected = np.sort(values[mask])[-count:]
  np.testing.assert_array_equal(np.sort(values[chosen]), expected)


@pytest.mark.parametrize("fraction", [0.2, 0.35, 0.6])
def test_it_is_the_quantile_with_interpolation(fraction):
  values = np.random.default_rng(3).gamma(2.0, size=(5, 7)).astype(np.float32)
  mask = np.arange(7) < np.array([7, 2, 0, 5, 6])[:, None]
  bound = np.quantile(values[mask].astype(np.float64), 1 - fraction)
  np.testing.assert_array_equal(
    top(values, mask, fraction), mask & (values >= bound)
  )


def test_ties_stay_together_and_zeros_are_one():
  values = jnp.array([[1.0, 0.0, -0.0, 0.0, -1.0, 3.0]])
  mask = jnp.ones((1, 6), bool)
  # 1 + floor(0.4 x 5) = 3 of the order 3, 1, 0, 0, 0, -1.
  chosen = top(values, mask, 0.4)
  np.testing.assert_array_equal(chosen, values >= 0)


def test_nothing_to_choose_from():
  assert not np.any(top(jnp.ones((2, 3)), jnp.zeros((2, 3), bool), 0.5))


def test_eight_devices_choose_the_same_without_gathering():
  mesh = make_mesh({"replica": 2, "fsdp": 4}, jax.devices()[:8])
  place = NamedSharding(mesh, PartitionSpec(("replica", "fsdp"), None))
  rng = np.random.default_rng(1)
  values = rng.normal(size=(16, 9)).astype(np.float32)
  mask = rng.random((16, 9)) < 0.7
  spread = jax.device_put((values, mask), place)
  np.testing.assert_array_equal(
    top(*spread, 0.3), top(jnp.asarray(values), jnp.asarray(mask), 0.3)
  )
  text = top.lower(*spread, 0.3).compile().as_text()
  assert "all-reduce" in text
  assert "all-gather" not in text
