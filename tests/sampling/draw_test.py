"""The draw against exact probabilities, and where rounding could mislead it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import NamedSharding, PartitionSpec

from opd_jax import sharding
from opd_jax.sampling import draw

BELOW_ONE = np.float32(1 - 2**-24)

draw_jit = jax.jit(draw.draw)


def tokens_at(logits, uniforms):
  """Tokens of one distribution at many uniforms."""
  uniforms = jnp.asarray(uniforms, jnp.float32)
  logits = jnp.broadcast_to(
    jnp.asarray(logits, jnp.float32), (len(uniforms), len(logits))
  )
  return [np.asarray(x) for x in draw_jit(logits, uniforms)]


def test_by_hand():
  # Sums 1/8, 1/8, 3/8, 7/8, 1: exact in float32, and the uniform may hit them.
  probabilities = np.array([1, 0, 2, 4, 1]) / 8
  with np.errstate(divide="ignore"):
    logits = np.log(probabilities)
  uniforms = np.array([0, 0.99, 1, 2.99, 3, 6.99, 7, 7.99]) / 8
  tokens, logprobs = tokens_at(logits, uniforms)
  np.testing.assert_array_equal(tokens, [0, 0, 2, 2, 3, 3, 4, 4])
  np.testing.assert_allclose(logprobs, logits[tokens], rtol=1e-6)


def test_every_token_gets_its_share():
  # Over an even grid of uniforms the counts are the probabilities, up to the
  # rounding of the two ends of each token's interval.
  size, columns = 2**15, 300
  logits = np.random.default_rng(0).normal(size=columns) * 3
  logits[[0, 7, 128, 299]] = -np.inf
  exact = np.exp(logits - scipy.special.logsumexp(logits))
  tokens, logprobs = tokens_at(logits, (np.arange(size) + 0.5) / size)
  assert np.all(np.diff(tokens) >= 0)
  counts = np.bincount(tokens, minlength=columns)
  np.testing.assert_allclose(counts, exact * size, atol=1.1)
  np.testing.assert_allclose(logprobs, np.log(exact[tokens]), atol=2e-6)


@pytest.mark.parametrize("uniform", [0, 1e-30, BELOW_ONE])
@pytest.mark.parametrize(
  "allowed", [[0], [255], [100], [3, 4], [0, 255], [1, 130, 254]]
)
def test_a_removed_column_is_never_drawn(uniform, allowed):
  logits = np.full(256, -np.inf)
  logits[allowed] = np.linspace(-3, 50, len(allowed))
  (token,), _ = tokens_at(logits, [uniform])
  assert token in allowed


def test_rounded_sums_never_reach_a_removed_tail():
  # Many inexact masses, with removed runs and columns between and behind.
  rng = np.random.default_rng(1)
  logits = rng.normal(size=(256, 1280)).astype(np.float32) * 5
  logits[rng.random(logits.shape) < 0.7] = -np.inf
  logits[:, rng.integers(700, 1280) :] = -np.inf
  for uniform in (0.0, BELOW_ONE):
    tokens, logprobs = draw_jit(
      jnp.asarray(logits), jnp.full(len(logits), uniform, jnp.float32)
    )
    drawn = np.take_along_axis(logits, np.asarray(tokens)[:, None], 1)
    assert np.all(np.isfinite(drawn))
    assert np.all(np.isfinite(logprobs))


def test_chi_square():
  columns, shape = 200, (512, 256)
  logits = np.random.default_rng(2).normal(size=columns)
  uniforms = draw.uniforms(
    jax.random.key(3), jnp.arange(shape[0]) + 10**6, shape[1]
  )
  tokens, _ = tokens_at(logits, np.asarray(uniforms).ravel())
  exact = np.exp(logits - scipy.special.logsumexp(logits))
  counts = np.bincount(tokens, minlength=columns)
  assert scipy.stats.chisquare(counts, exact * tokens.size).pvalue > 1e-3


def test_uniforms_belong_to_row_and_index():
  key = jax.random.key(0)
  rows = jnp.array([5, 2**31 - 1, 0])
  uniforms = draw.uniforms(key, rows, 4)
  assert len(np.unique(uniforms)) == uniforms.size
  np.testing.assert_array_equal(
    draw.uniforms(key, rows[::-1], 6)[::-1, :4], uniforms
  )
  expected = jax.random.uniform(
    jax.random.fold_in(jax.random.fold_in(key, 5), 2)
  )
  assert uniforms[0, 2] == expected


def test_greedy_takes_the_lowest_id_on_ties():
  tokens, logprobs = draw.greedy(jnp.array([[0.0, 2.0, 2.0, -jnp.inf]]))
  assert tokens.tolist() == [1]
  np.testing.assert_allclose(logprobs, [-np.log(2 + np.exp(-2))], rtol=1e-6)


def test_spread_vocabulary_stays_where_it_is():
  # 2 x 4 devices; runs of 1187 columns as in a vocabulary of 151,936.
  mesh = sharding.make_mesh({"fsdp": 2, "tensor": 4})
  columns = 128 * 37
  logits = jax.random.normal(jax.random.key(0), (8, columns)) * 3
  uniforms = jax.random.uniform(jax.random.key(1), (8,))
  spread = (
    jax.device_put(
      logits, NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    ),
    jax.device_put(uniforms, NamedSharding(mesh, PartitionSpec("fsdp"))),
  )
  tokens, logprobs = draw_jit(*spread)
  alone, alone_logprobs = draw_jit(logits, uniforms)
  np.testing.assert_array_equal(tokens, alone)
  np.testing.assert_allclose(logprobs, alone_logprobs, rtol=1e-6)
  program = draw_jit.lower(*spread).compile().as_text()
  gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", program)
  assert gathered
  assert max(np.prod([int(n) for n in s.split(",")]) for s in gathered) <= (
    4 * draw.BLOCKS
  )
