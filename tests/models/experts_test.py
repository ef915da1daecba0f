"""Experts in blocks of rows against all experts for every token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.models import experts

TOKENS, CHOICES, COUNT, WIDTH, SIZE = 75, 3, 5, 6, 4


def _arrays(chosen, dtype=jnp.float32):
  random = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(random.standard_normal(shape), dtype)
  return (
    draw(3, TOKENS // 3, WIDTH),
    jax.nn.softmax(draw(3, TOKENS // 3, CHOICES).astype(jnp.float32)),
    jnp.asarray(chosen.reshape(3, TOKENS // 3, CHOICES), jnp.int32),
    (
      draw(COUNT, WIDTH, SIZE),
      draw(COUNT, WIDTH, SIZE),
      draw(COUNT, SIZE, WIDTH),
    ),
  )


def _choices(shares):
  """Different experts per token, drawn in these proportions."""
  random = np.random.default_rng(1)
  shares = np.asarray(shares) / np.sum(shares)
  return np.stack(
    [
      random.choice(len(shares), CHOICES, replace=False, p=shares)
      for _ in range(TOKENS)
    ]
  )


CHOSEN = {
  "even": _choices([1, 1, 1, 1, 1]),
  "some are idle": _choices([1, 0, 1, 0, 1]),
  "nearly all to one": _choices([100, 1, 1, 1, 1]),
  # As a device sees it whose experts are the middle ones.
  "elsewhere": _choices([1] * 11) - 3,
  "nobody here": np.full((TOKENS, CHOICES), COUNT),
}


def _all_experts(x, weights, chosen, kernels):
  gate, up, down = kernels
  inner = jax.nn.silu(jnp.einsum("btd,edf->btef", x, gate))
  inner = inner * jnp.einsum("btd,edf->btef", x, up)
  outputs = jnp.einsum("btef,efd->bted", inner, down)
  share = jnp.sum(jax.nn.one_hot(chosen, COUNT) * weights[..., None], axis=2)
  return jnp.einsum("bte,bted->btd", share, outputs)


def _value_and_slopes(function, x, weights, chosen, kernels):
  slopes = np.random.default_rng(2).standard_normal(x.shape)

  def total(x, weights, kernels):
    y = function(x, weights, chosen, kernels)
    return jnp.sum(y * slopes), y

  return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(
    x, weights, kernels
  )


def _mix(x, weights, chosen, kernels):
  return experts.mix(x, weights, chosen, kernels, "silu")


@pytest.mark.parametrize("case", CHOSEN)
def test_values_and_slopes_are_those_of_all_experts(case):
  arrays = _arrays(CHOSEN[case])
  (_, got), slopes = _value_and_slopes(_mix, *arrays)
  (_, want), expected = _value_and_slopes(_all_experts, *arrays)
  np.testing.assert_allclose(got, want, atol=2e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4),
    slopes,
    expected,
  )


def test_a_token_does_not_depend_on_its_batch_mates():
  x, weights, chosen, kernels = _arrays(CHOSEN["nearly all to one"])
  whole = jax.jit(_mix)(x, weights, chosen, kernels)
  for row in range(3):
    only = slice(row, row + 1)
    alone = jax.jit(_mix)(x[only], weights[only], chosen[only], kernels)
    np.testing.assert_allclose(alone[0], whole[row], atol=1e-6)


def test_slopes_of_bfloat16_kernels_are_summed_in_float32():
  """512 like blocks of one expert: a bfloat16 sum of them ends at half."""
  _, _, _, kernels = _arrays(CHOSEN["even"])
  count = 512 * experts.block_size(2**17, COUNT)
  x = 1.0 + jnp.abs(jax.random.normal(jax.random.key(0), (1, count, WIDTH)))
  weights, chosen = jnp.ones((1, count, 1)), jnp.zeros((1, count, 1), jnp.int32)

  def slopes(dtype):
    down = jax.grad(
      lambda down: jnp.sum(
        _mix(
          x.astype(dtype),
          weights,
          chosen,
          (*jax.tree.map(lambda leaf: leaf.astype(dtype), kernels[:2]), down),
        ).astype(jnp.float32)
      )
    )
    return jax.jit(down)(kernels[2].astype(dtype))

  got, want = slopes(jnp.bfloat16), slopes(jnp.float32)
  assert got.dtype == jnp.bfloat16
  error = jnp.max(jnp.abs(got[0].astype(jnp.float32) - want[0]))
  assert error < 0.02 * jnp.max(jnp.abs(want[0]))


@pytest.mark.parametrize(
  ("choices", "count", "rows"),
  [(4, 8, 16), (1024, 8, 32), (2**14, 64, 64), (2**20, 8, 256)],
)
def test_padding_is_a_small_part_of_the_rows(choices, count, rows):
  assert experts.block_size(choices, count) == rows
