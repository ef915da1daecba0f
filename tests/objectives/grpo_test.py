"""GRPO on groups made by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import objectives
from opd_jax.errors import InputError
from opd_jax.objectives.grpo import group_advantage
from tests.objectives import support

# Rows of two prompts, mixed up; the first group has rewards 1, 0, 0, the
# second 0.5, 0.5.
GROUP = jnp.array([0, 3, 0, 3, 0], jnp.int32)
REWARDS = jnp.array([1.0, 0.5, 0.0, 0.5, 0.0], jnp.float32)


def test_advantage_of_groups_by_hand():
  """Mean 1/3; squares 4/9 + 1/9 + 1/9 = 2/3, over G - 1 = 2: std 0.577350."""
  plain = group_advantage(REWARDS, GROUP, normalize_std=False)
  np.testing.assert_allclose(plain, [2 / 3, 0, -1 / 3, 0, -1 / 3], atol=1e-7)
  scaled = group_advantage(REWARDS, GROUP, normalize_std=True)
  expected = np.array([1.154699, 0, -0.577349, 0, -0.577349])
  np.testing.assert_allclose(scaled, expected, atol=2e-6)


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_equal_rewards_teach_nothing(rows):
  """Exactly 0, though a sum of 7 times 0.3, over 7, is not 0.3."""
  rewards = jnp.full(rows, 0.3, jnp.float32)
  group = jnp.zeros(rows, jnp.int32)
  for normalize_std in (False, True):
    found = group_advantage(rewards, group, normalize_std=normalize_std)
    np.testing.assert_array_equal(found, 0.0)


def _loss(student, shift=support.NO_SHIFT, rewards=(1.0, 0.0), **options):
  objective = objectives.create({"name": "grpo", **options})
  behavior = support.token_logprobs(support.STUDENT_LOGITS, support.TOKENS)
  return support.loss_of(
    objective,
    {"student": student, "reference": support.REFERENCE_LOGITS},
    support.TOKENS,
    support.MASK,
    behavior + shift,
    group=jnp.zeros(2, jnp.int32),
    rewards=jnp.array(rewards, jnp.float32),
  )[0]


@pytest.mark.parametrize(
  ("reduction", "weights"),
  [
    ("seq_mean_token_mean", (1 / 6, 1 / 4)),
    ("token_mean", (1 / 5, 1 / 5)),
    ("seq_mean_token_sum", (1 / 2, 1 / 2)),
  ],
)
def test_gradient_by_hand(reduction, weights):
  """Advantage 1/2 for 3 tokens, -1/2 for 2: each A (p - onehot) times weight.

  With two rewards 1 and 0 the deviation is sqrt(1/2).
  """
  for normalize_std, size in ((False, 0.5), (True, 0.5 / np.sqrt(0.5))):
    gradient = jax.grad(lambda student, **options: _loss(student, **options))(
      support.STUDENT_LOGITS,
      normalize_std=normalize_std,
      reduction=reduction,
    )
    chance = jax.nn.softmax(support.STUDENT_LOGITS, axis=-1)
    slope = np.asarray(chance - jax.nn.one_hot(support.TOKENS, 4))
    advantage = np.array([size, -size]) * np.array(weights)
    mask = np.asarray(support.MASK)[:, :, None]
    expected = slope * advantage[:, None, None] * mask
    np.testing.assert_allclose(gradient, expected, atol=2e-6)


def test_clips_by_hand():
  """Ratios exp(-shift) = 0.951229, 1.105171, 0.818731; 1, 1.349859.

  A token is stopped where its ratio already lies where its advantage pulls it.
  """

  def slopes(rewards, **options):
    gradient = jax.grad(
      lambda student: _loss(student, support.BEHAVIOR_SHIFT, rewards, **options)
    )(support.STUDENT_LOGITS)
    return np.any(np.abs(np.asarray(gradient)) > 1e-8, axis=-1).tolist()

  free = {"clip_low": None, "clip_high": None}
  whole = [[True, True, True], [True, True, False]]
  assert slopes((1.0, 0.0), **free) == whole
  # Above 1.1 and positive: token 1 of row 0.
  up = slopes((1.0, 0.0), clip_low=0.1, clip_high=0.1)
  assert up == [[True, False, True], [True, True, False]]
  # Below 0.9 and negative: token 2 of row 0; above 1.1 and positive: the last.
  down = slopes((0.0, 1.0), clip_low=0.1, clip_high=0.1)
  assert down == [[True, True, False], [True, False, False]]
  dual = slopes((1.0, 0.0), **free, dual_clip=1.2)
  assert dual == [[True, True, True], [True, False, False]]


def test_the_penalty_is_k2_with_its_coefficient():
  rewards = (1.0, 1.0)
  student = support.token_logprobs(support.STUDENT_LOGITS, support.TOKENS)
  reference = support.token_logprobs(support.REFERENCE_LOGITS, support.TOKENS)
  half = np.asarray(student - reference) ** 2 / 2
  rows = [half[0].mean(), half[1, :2].mean()]
  found = _loss(support.STUDENT_LOGITS, rewards=rewards, kl=0.04)
  np.testing.assert_allclose(found, 0.04 * np.mean(rows), rtol=1e-5)


def test_what_it_needs():
  plain = objectives.create({"name": "grpo"})
  assert plain.needs.roles() == ("student",)
  assert plain.needs.host
  assert not plain.needs.pure_sampling
  anchored = objectives.create({"name": "grpo", "kl": 0.1})
  assert anchored.frozen_roles() == ("reference",)
  assert anchored.needs.pure_sampling


@pytest.mark.parametrize(
  ("options", "named"),
  [
    ({"kl": -1.0}, "kl must be >= 0 and finite, got -1.0; 0 for off"),
    ({"kl": float("nan")}, "kl must be >= 0"),
    ({"clip_low": 2.0}, "clip_low must be in"),
    ({"reduction": "mean"}, "mean"),
    ({"normalise_std": True}, "did you mean objective.normalize_std"),
  ],
)
def test_bad_options(options, named):
  with pytest.raises(InputError, match=named):
    objectives.create({"name": "grpo", **options})
