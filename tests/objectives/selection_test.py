"""Tokens by rank: the count, ties, padding, signs, quantiles, many devices."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from opd_jax.objectives.selection import largest, quantile, top_fraction
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


first = jax.jit(largest, static_argnums=(2, 3))


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("fraction", [0.1, 0.29, 0.5, 0.57, 1.0])
def test_a_share_is_counted_exactly_and_ties_go_to_the_first(fraction, per_row):
  """max(1, floor(fraction m)) of m, with many equal values among them."""
  rng = np.random.default_rng(11)
  lengths = np.array([100, 0, 1, 3, 64, 99, 100, 7])
  mask = np.arange(100) < lengths[:, None]
  mask &= rng.random(mask.shape) < 0.9
  mask[0] = True
  values = rng.integers(-3, 4, mask.shape).astype(np.float32) / 2
  chosen = np.asarray(
    first(np.where(mask, values, np.nan), mask, fraction, per_row)
  )
  expected = np.zeros_like(mask)
  groups = list(range(8)) if per_row else [slice(None)]
  for group in groups:
    inside = np.flatnonzero(mask[group])
    count = int(Fraction(str(fraction)) * len(inside))
    count = min(max(count, 1), len(inside))
    order = np.argsort(-values[group].ravel()[inside], kind="stable")
    taken = np.zeros(mask[group].size, bool)
    taken[inside[order[:count]]] = True
    expected[group] = taken.reshape(mask[group].shape)
  np.testing.assert_array_equal(chosen, expected)
  if per_row:
    assert chosen[0].sum() == round(100 * fraction)


@pytest.mark.parametrize("fraction", [0.0, 0.29, 0.98, 1.0])
def test_quantiles_are_those_of_numpy(fraction):
  rng = np.random.default_rng(5)
  mask = np.arange(30) < np.array([30, 1, 2, 17])[:, None]
  values = rng.normal(size=mask.shape).astype(np.float32)
  values[0, :9] = values[0, 20]  # Equal ones on both sides.
  found = quantile(jnp.asarray(values), jnp.asarray(mask), fraction, True)
  expected = [
    np.quantile(row[kept].astype(np.float64), fraction)
    for row, kept in zip(values, mask, strict=True)
  ]
  np.testing.assert_allclose(found[:, 0], expected, atol=1e-6)
  whole = quantile(jnp.asarray(values), jnp.asarray(mask), fraction, False)
  expected = np.quantile(values[mask].astype(np.float64), fraction)
  np.testing.assert_allclose(whole[0, 0], expected, atol=1e-6)
