"""What every objective must satisfy, whatever it computes.

Registered objectives are taken from the registry, so a new one is tested by
being there; the toys use every part of the contract. `sft` is not in the
registry, because it is no choice for `train`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import objectives
from opd_jax.objectives import base, reduce, sft
from tests.objectives import support, toys

# More ids than the largest default of a top_k.
ROWS, LENGTH, VOCAB = 4, 6, 67
# Three rows of one prompt, one of another; their rewards.
BY_ROW = {
  "group": jnp.array([0, 0, 1, 0], jnp.int32),
  "rewards": jnp.array([1.0, 0.0, 1.0, 0.5], jnp.float32),
}
# Draws for each token by the place of its row.
DRAWING = {"tropd"}


def _objective(name):
  if name in toys.TOYS:
    return toys.bind(name)
  if name == "sft":
    return base.Objective.bind(name, sft, sft.Config())
  return objectives.create({"name": name})


NAMES = (*sorted(objectives.OBJECTIVES), "sft", *toys.TOYS)
every_objective = pytest.mark.parametrize("name", NAMES)
every_pointwise_objective = pytest.mark.parametrize(
  "name", [name for name in NAMES if not _objective(name).needs.whole_rows]
)


def _case(seed=0):
  keys = jax.random.split(jax.random.key(seed), 7)
  logits = {
    role: jax.random.normal(key, (ROWS, LENGTH, VOCAB))
    for role, key in zip(base.ROLES, keys[:4], strict=True)
  }
  tokens = jax.random.randint(keys[4], (ROWS, LENGTH), 0, VOCAB, jnp.int32)
  lengths = jnp.array([6, 3, 0, 5])
  mask = jnp.arange(LENGTH)[None, :] < lengths[:, None]
  behavior = support.token_logprobs(logits["student"], tokens)
  noise = 0.1 * jax.random.normal(keys[5], behavior.shape)
  return logits, tokens, mask, jnp.where(mask, behavior + noise, 0.0)


def _loss(name, case, by_row=BY_ROW):
  return support.loss_of(_objective(name), *case, **by_row)[0]


def _gradients(name, case):
  """Gradients in the logits of the trained roles, as the engine takes them."""
  logits, *rest = case
  trained = _objective(name).needs.gradient_roles()

  def loss(by_role):
    return _loss(name, ({**logits, **by_role}, *rest))

  return jax.jit(jax.grad(loss))({role: logits[role] for role in trained})


@every_objective
def test_every_trained_role_moves(name):
  gradients = _gradients(name, _case())
  assert gradients
  for role, gradient in gradients.items():
    assert np.all(np.isfinite(gradient)), role
    assert jnp.any(gradient != 0), role


@every_objective
def test_nothing_behind_the_mask_counts(name):
  case = logits, tokens, mask, behavior = _case()
  noisy = {
    role: jnp.where(mask[..., None], leaf, jnp.nan)
    for role, leaf in logits.items()
  }
  other = (noisy, jnp.where(mask, tokens, VOCAB - 1), mask, behavior)
  np.testing.assert_array_equal(_loss(name, case), _loss(name, other))
  for role, gradient in _gradients(name, other).items():
    np.testing.assert_array_equal(
      jnp.where(mask[..., None], 0.0, gradient), 0.0, err_msg=role
    )


@every_objective
def test_an_empty_batch_is_zero(name):
  logits, tokens, mask, behavior = _case()
  case = (logits, tokens, jnp.zeros_like(mask), jnp.zeros_like(behavior))
  assert _loss(name, case) == 0.0
  for gradient in _gradients(name, case).values():
    np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize(
  "name", [name for name in NAMES if _objective(name).needs.given != "never"]
)
def test_a_given_token_has_no_behavior(name):
  """Whatever stands there is not read; the drawn ones beside it count."""
  logits, tokens, mask, behavior = _case()
  given = jnp.arange(LENGTH)[None, :] < jnp.array([6, 2, 0, 3])[:, None]
  objective = _objective(name)

  def loss(student, behavior):
    case = ({**logits, "student": student}, tokens, mask, behavior)
    return support.loss_of(objective, *case, given=given, **BY_ROW)[0]

  both = jax.jit(jax.value_and_grad(loss))
  student = logits["student"]
  value, gradient = both(student, jnp.where(given, 0.0, behavior))
  assert np.all(np.isfinite(gradient))
  assert jnp.any(gradient[given & mask] != 0)
  assert jnp.any(gradient[~given & mask] != 0)
  for other in (-3.0, 3.0):
    found = both(student, jnp.where(given, other, behavior))
    jax.tree.map(np.testing.assert_array_equal, found, (value, gradient))


@pytest.mark.parametrize(
  "name", [name for name in NAMES if name not in DRAWING]
)
def test_order_of_rows_does_not_matter(name):
  case = logits, tokens, mask, behavior = _case()
  order = jnp.array([2, 0, 3, 1])
  shuffled = (
    {role: leaf[order] for role, leaf in logits.items()},
    tokens[order],
    mask[order],
    behavior[order],
  )
  by_row = {key: leaf[order] for key, leaf in BY_ROW.items()}
  np.testing.assert_allclose(
    _loss(name, case), _loss(name, shuffled, by_row), rtol=1e-6, atol=1e-6
  )


@every_pointwise_objective
def test_chunks_of_time_add_up(name):
  objective = _objective(name)
  logits, tokens, mask, behavior = _case()
  needs = dataclasses.replace(
    objective.prepare_needs, rewards=objective.needs.rewards
  )
  before = support.scores_of(needs, logits, tokens, mask, behavior, **BY_ROW)
  schedule = support.schedule(3)
  signals = objective.prepare(before, objective.init_state(), schedule)
  scores = support.scores_of(
    objective.needs, logits, tokens, mask, behavior, **BY_ROW
  )
  counts = reduce.Counts.of(mask)

  def total(start, stop):
    def cut(leaf):
      return leaf[:, start:stop] if leaf.ndim >= 2 else leaf

    part = jax.tree.map(cut, scores)
    some = dataclasses.replace(signals, token=jax.tree.map(cut, signals.token))
    terms, _ = objective.terms(part, some)
    return sum(
      reduce.partial_sum(term, cut(mask), counts, signals)
      for term in terms.values()
    )

  np.testing.assert_allclose(
    total(0, LENGTH), total(0, 2) + total(2, 5) + total(5, LENGTH), atol=1e-6
  )
