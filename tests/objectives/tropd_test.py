"""tropd: worked numbers by the spec's coins, gradients, gates, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import objectives
from opd_jax.errors import InputError
from opd_jax.objectives import base, reduce
from tests.objectives import support

COINS = jnp.array([[0.50, 0.99, 0.10], [0.30, 0.70, 0.0]], jnp.float32)
PREFIX = jnp.array([[0, 0, 0], [1, 0, 0]], bool)
PUSHED = [
  [
    [-0.048499, 0.024564, 0.009037, 0.014899],
    [0.009210, 0.005586, -0.023129, 0.008333],
    [-0.107148, 0.119828, -0.039418, 0.026737],
  ],
  [
    [0.009252, 0.009252, 0.009252, -0.027757],
    [-0.001207, -0.003282, -0.008921, 0.013410],
    [0.0, 0.0, 0.0, 0.0],
  ],
]


def _create(**options):
  return objectives.create({"name": "tropd", "top_k": 2, **options})


def _scores(objective, logits, shift=support.NO_SHIFT, given=None):
  """Scores on the fixture; `given` marks tokens the teacher wrote."""
  behavior = support.token_logprobs(support.STUDENT_LOGITS, support.TOKENS)
  by_role = {"student": logits, "teacher": support.TEACHER_LOGITS}
  scores = support.scores_of(
    objective.needs, by_role, support.TOKENS, support.MASK, behavior + shift
  )
  if given is None:
    return scores
  return dataclasses.replace(
    scores,
    sampled_mask=support.MASK & ~given,
    behavior_valid=support.MASK & ~given,
    behavior_logprobs=jnp.where(given, 0.0, scores.behavior_logprobs),
  )


def _loss(objective, logits=support.STUDENT_LOGITS, coins=COINS, **others):
  """The loss with given coins."""
  signals = base.Signals(token={"uniform": coins})
  terms, _ = objective.terms(_scores(objective, logits, **others), signals)
  counts = reduce.Counts.of(support.MASK)
  return sum(
    reduce.partial_sum(term, support.MASK, counts, signals)
    for term in terms.values()
  )


def test_trust_and_the_two_sides():
  objective = _create()
  terms, statistics = objective.terms(
    _scores(objective, support.STUDENT_LOGITS),
    base.Signals(token={"uniform": COINS}),
  )
  for found, expected in (
    (statistics["trust"], [[1, 1, 0.026231], [1, 0.828367, 0]]),
    (statistics["inside"], [[1, 1, 0], [1, 1, 0]]),
    (terms["policy"], [[-0.444989, -0.284610, 0], [-0.185045, 0.188300, 0]]),
    (terms["outlier"], [[0, 0, 1.568666], [0, 0, 0]]),
  ):
    np.testing.assert_allclose(found.loss, expected, atol=1e-5)


@pytest.mark.parametrize(
  ("options", "expected"),
  [
    ({}, 0.168464),
    ({"outlier": "mask"}, -0.145269),
    ({"gate": "expected"}, 0.176211),
    ({"gate": "threshold", "outlier": "mask", "tau": -1.0}, -0.145269),
    ({"gate": "threshold", "outlier": "mask", "tau": -2.0}, -0.145269),
    ({"gate": "threshold", "outlier": "clip", "tau": -1.0}, 0.054731),
    ({"gate": "threshold", "outlier": "clip", "tau": -2.0}, 0.254731),
    # The coin leaves the third token outside, the threshold too: the same.
    ({"gate": "bernoulli", "outlier": "clip", "tau": -2.0}, 0.254731),
    ({"gate": "threshold", "tau": -1.0}, 0.168464),
  ],
)
def test_worked_numbers(options, expected):
  np.testing.assert_allclose(_loss(_create(**options)), expected, atol=1e-5)


@pytest.mark.parametrize(
  ("guidance", "expected"),
  [(None, 0.205510), (0.001, 0.205510), (0.1, 0.209174), (0.0, 0.205473)],
)
def test_worked_numbers_of_a_prefix(guidance, expected):
  """The last by hand: without 0.1 * 0.185045 / 5 of the first two."""
  objective = _create(guidance=guidance)
  found = _loss(objective, given=PREFIX)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  # Whether there must be given tokens is the option's.
  assert objective.needs.given == ("must" if guidance else "may")


def test_gradient_of_a_prefix():
  """Imitation at the given token, all else as without it."""
  gradient = jax.grad(
    lambda logits: _loss(_create(guidance=0.1), logits, given=PREFIX)
  )(support.STUDENT_LOGITS)
  expected = np.array(PUSHED)
  expected[1, 0] = [0.005, 0.005, 0.005, -0.015]
  np.testing.assert_allclose(gradient, expected, atol=1e-5)


def test_the_log_is_about_drawn_tokens():
  objective = _create()
  scores = _scores(objective, support.STUDENT_LOGITS, given=PREFIX)
  signals = objective.prepare(scores, {}, support.schedule(0))
  _, statistics = objective.terms(
    scores, dataclasses.replace(signals, token={"uniform": COINS})
  )
  counts = reduce.Counts.of(support.MASK)
  found = {
    name: reduce.partial_sum(term, support.MASK, counts, signals)
    for name, term in statistics.items()
  }
  drawn = [0.444989, 0.284610, -3.640821, -0.188300]
  np.testing.assert_allclose(found["advantage"], np.mean(drawn), atol=1e-5)
  np.testing.assert_allclose(found["ratio"], 1.0, atol=1e-6)
  np.testing.assert_allclose(
    found["trust"], (2 + 0.026231 + 0.828367) / 4, atol=1e-5
  )
  np.testing.assert_allclose(found["inside"], 0.75, atol=1e-6)


def test_gradient():
  gradient = jax.grad(lambda z: _loss(_create(), z))(support.STUDENT_LOGITS)
  np.testing.assert_allclose(gradient, PUSHED, atol=1e-5)


@pytest.mark.parametrize("gate", ["bernoulli", "expected"])
def test_gradient_is_the_closed_form(gate):
  """M ratio A (p_S - onehot(y)) + (1 - M) (p_S m_T - p_T on two ids)."""
  shift = {"shift": support.BEHAVIOR_SHIFT}
  objective = _create(gate=gate, reduction="sum")
  gradient = jax.grad(lambda z: _loss(objective, z, **shift))(
    support.STUDENT_LOGITS
  )
  student, teacher = (
    jax.nn.softmax(logits, axis=-1)
    for logits in (support.STUDENT_LOGITS, support.TEACHER_LOGITS)
  )
  onehot = jnp.eye(4, dtype=jnp.float32)[support.TOKENS]
  quotient = jnp.sum(onehot * teacher, -1) / jnp.sum(onehot * student, -1)
  trust = jnp.minimum(quotient, 1.0)
  inside = trust if gate == "expected" else (COINS < trust).astype(jnp.float32)
  inside = inside[..., None]
  rank = jnp.argsort(jnp.argsort(-teacher, axis=-1), axis=-1)
  top = jnp.where(rank < 2, teacher, 0.0)
  ratio = jnp.exp(-support.BEHAVIOR_SHIFT)
  pushed = (ratio * jnp.log(quotient))[..., None] * (student - onehot)
  followed = student * jnp.sum(top, -1, keepdims=True) - top
  expected = inside * pushed + (1.0 - inside) * followed
  np.testing.assert_allclose(
    gradient, jnp.where(support.MASK[..., None], expected, 0.0), atol=1e-6
  )
  assert np.max(np.abs(followed)) <= 1.0


def test_coins_are_of_the_step_and_expect_the_trust():
  """Other coins at other steps; on average the loss of gate="expected"."""
  objective = _create()
  by_role = dict.fromkeys(base.ROLES, support.TEACHER_LOGITS)
  by_role["student"] = support.STUDENT_LOGITS
  behavior = support.token_logprobs(support.STUDENT_LOGITS, support.TOKENS)

  @jax.jit
  def loss(step):
    return support.loss_of(
      objective, by_role, support.TOKENS, support.MASK, behavior, step=step
    )[0]

  losses = np.array([loss(jnp.int32(step)) for step in range(400)])
  assert loss(jnp.int32(3)) == losses[3]
  assert len(np.unique(losses)) >= 3
  # The third token's coin moves the loss by 0.41 in 2.6 % of the steps, the
  # last one's by 0.02: the standard error of the mean is 0.0033.
  np.testing.assert_allclose(np.mean(losses), 0.176211, atol=0.015)


@pytest.mark.parametrize("place", [(0, 0), (0, 2), (1, 1)])
def test_expected_gradient_over_token_and_coin(place):
  """That of sum_v p_S f(p_T / p_S) and TV times the forward KL, exactly."""
  student = support.STUDENT_LOGITS[place]
  teacher = support.TEACHER_LOGITS[place]
  objective = _create(reduction="sum")
  p_student, p_teacher = jax.nn.softmax(student), jax.nn.softmax(teacher)
  trust = jnp.minimum(p_teacher / p_student, 1.0)

  def loss(logits, token, coin):
    tokens = jnp.full((1, 1), token, jnp.int32)
    scores = support.scores_of(
      objective.needs,
      {"student": logits[None, None], "teacher": teacher[None, None]},
      tokens,
      jnp.ones((1, 1), bool),
      support.token_logprobs(student[None, None], tokens),
    )
    coins = jnp.full((1, 1), coin, jnp.float32)
    terms, _ = objective.terms(scores, base.Signals(token={"uniform": coins}))
    return sum(jnp.sum(term.loss) for term in terms.values())

  found = jnp.zeros(4)
  for token in range(4):
    # The coin 0 is always below the trust, 1 never.
    for coin, chance in ((0.0, trust[token]), (1.0, 1.0 - trust[token])):
      gradient = jax.grad(loss)(student, token, coin)
      found += p_student[token] * chance * gradient

  def claim(logits):
    p = jax.nn.softmax(logits)
    u = p_teacher / p
    f = jnp.where(u <= 1, u * jnp.log(u) ** 2 / 2, u - 1 - jnp.log(u))
    top = jnp.argsort(-p_teacher)[:2]
    forward = jnp.sum(p_teacher[top] * (jnp.log(p_teacher) - jnp.log(p))[top])
    distance = jnp.sum(jnp.abs(p_student - p_teacher)) / 2
    return jnp.sum(p * f) + distance * forward

  np.testing.assert_allclose(found, jax.grad(claim)(student), atol=1e-6)


def test_a_mask_needs_no_distributions():
  assert not _create(outlier="mask").needs.teacher.vocab_logprobs
  assert _create().needs.teacher.vocab_logprobs


@pytest.mark.parametrize(
  ("options", "named"),
  [
    ({"guidance": -0.1}, "guidance must be >= 0, got -0.1"),
    ({"gate": "threshold"}, "need tau, .* got None"),
    ({"outlier": "clip", "tau": 0.5}, "need tau, .* got 0.5"),
    ({"tau": -1.0}, "tau = -1.0 has no meaning with gate='bernoulli'"),
    ({"top_k": 0}, "needs top_k >= 1.*; set top_k=None for all"),
    ({"outlier": "none"}, "objective.outlier must be one of"),
  ],
)
def test_bad_options_are_named(options, named):
  with pytest.raises(InputError, match=named):
    _create(**options)


def test_more_ids_than_there_are():
  objective = objectives.create({"name": "tropd"})
  with pytest.raises(
    InputError, match=r"tropd: top_k must .*; set top_k=None for all"
  ):
    objective.check_vocabulary(61)
  objectives.create({"name": "tropd", "outlier": "mask"}).check_vocabulary(61)
