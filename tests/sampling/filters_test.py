"""The filters against twins in numpy that sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.config import SamplingConfig
from opd_jax.sampling import filters


def softmax(logits):
  weights = np.exp(logits - logits.max())
  return weights / weights.sum()


def top_k_twin(logits, k):
  return logits >= np.sort(logits)[-k]


def top_p_twin(logits, p):
  likelier = [softmax(logits)[logits > value].sum() for value in logits]
  return np.array(likelier) < p


def min_p_twin(logits, p):
  return softmax(logits) >= p * softmax(logits).max()


TWINS = {"top_k": top_k_twin, "top_p": top_p_twin, "min_p": min_p_twin}


def rows():
  """Wide and narrow, negative and positive, tied, with removed columns."""
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(12, 61)).astype(np.float32)
  logits *= np.geomspace(1e-3, 30, 12, dtype=np.float32)[:, None]
  logits[2] -= 100
  logits[3] += 1000
  logits[4:6] = np.round(logits[4:6] * 2) / 2
  logits[6, :40] = -np.inf
  logits[7] = 0
  logits[8, ::2] = -0.0
  return logits


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("top_k", 1),
    ("top_k", 5),
    ("top_k", 61),
    ("top_p", 1e-9),
    ("top_p", 0.3),
    ("top_p", 0.95),
    ("min_p", 0.02),
    ("min_p", 0.7),
    ("min_p", 1.0),
  ],
)
def test_filter_equals_sorting(name, value):
  logits = rows()
  filtered = np.asarray(getattr(filters, name)(jnp.asarray(logits), value))
  kept = np.stack(
    [TWINS[name](row.astype(np.float64), value) for row in logits]
  )
  np.testing.assert_array_equal(filtered, np.where(kept, logits, -np.inf))
  assert np.all(kept.any(axis=1))


def test_top_p_by_hand():
  logits = jnp.log(jnp.array([[1.0, 4.0, 2.0, 1.0]]) / 8)
  for p, kept in {
    0.5: [1],
    0.51: [1, 2],
    0.75: [1, 2],
    0.76: [0, 1, 2, 3],
  }.items():
    assert np.flatnonzero(filters.top_p(logits, p) > -jnp.inf).tolist() == kept


def test_order_and_renormalisation():
  config = SamplingConfig(temperature=0.5, top_k=20, top_p=0.8, min_p=0.1)
  logits = np.random.default_rng(1).normal(size=(3, 50)).astype(np.float32)
  actual = jax.nn.softmax(filters.apply(jnp.asarray(logits), config))
  for row, probabilities in zip(logits, actual, strict=True):
    expected = row.astype(np.float64) / 0.5
    for name, twin in TWINS.items():
      kept = twin(expected, getattr(config, name))
      expected = np.where(kept, expected, -np.inf)
    np.testing.assert_allclose(probabilities, softmax(expected), rtol=1e-5)


def test_nothing_to_remove():
  logits = jnp.asarray(rows())
  for config in (SamplingConfig(), SamplingConfig(top_p=1.0)):
    np.testing.assert_array_equal(filters.apply(logits, config), logits)
