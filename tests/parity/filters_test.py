"""The filters against the logits processors of transformers."""

import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.config import SamplingConfig
from opd_jax.sampling import filters

torch = pytest.importorskip("torch", reason="compares with transformers")
logits_process = pytest.importorskip(
  "transformers.generation.logits_process", reason="compares with transformers"
)

pytestmark = pytest.mark.parity

WARPERS = {
  "temperature": logits_process.TemperatureLogitsWarper,
  "top_k": logits_process.TopKLogitsWarper,
  "top_p": logits_process.TopPLogitsWarper,
  "min_p": logits_process.MinPLogitsWarper,
}


def transformers_filtered(logits, settings):
  """The processors in the order in which `generate` applies them."""
  scores = torch.tensor(logits)
  for name, warper in WARPERS.items():
    if name in settings:
      scores = warper(settings[name])(None, scores)
  return scores.numpy()


def logits_of(seed):
  rng = np.random.default_rng(seed)
  scale = np.geomspace(0.1, 10, 16, dtype=np.float32)[:, None]
  return rng.normal(size=(16, 500)).astype(np.float32) * scale


@pytest.mark.parametrize(
  "settings",
  [
    {"temperature": 0.3},
    {"top_k": 1},
    {"top_k": 40},
    {"top_p": 1e-6},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"temperature": 1.7, "top_k": 100, "top_p": 0.8},
    {"temperature": 0.6, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 0.9, "top_k": 60, "top_p": 0.9, "min_p": 0.1},
  ],
)
def test_same_logits(settings):
  logits = logits_of(0)
  actual = filters.apply(jnp.asarray(logits), SamplingConfig(**settings))
  np.testing.assert_allclose(
    actual, transformers_filtered(logits, settings), rtol=1e-6
  )


@pytest.mark.parametrize(
  "settings", [{"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.4}]
)
def test_ties(settings):
  # Where transformers splits columns tied at the top-p threshold, all stay.
  logits = np.round(logits_of(1))
  expected = transformers_filtered(logits, settings)
  last = expected.min(axis=1, where=np.isfinite(expected), initial=np.inf)
  expected = np.where(logits >= last[:, None], logits, -np.inf)
  actual = filters.apply(jnp.asarray(logits), SamplingConfig(**settings))
  np.testing.assert_array_equal(actual, expected)
