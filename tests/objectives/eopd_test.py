"""eopd: worked numbers, worked gradient, and what the gate and clip do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import objectives
from opd_jax.errors import InputError
from opd_jax.objectives import base
from tests.objectives import support


def _create(**options):
  return objectives.create({"name": "eopd", "top_k": 2, **options})


def _terms(objective, shift=support.BEHAVIOR_SHIFT, student=None):
  """Both terms, per token; the masked one set to 0."""
  student = support.STUDENT_LOGITS if student is None else student
  behavior = support.token_logprobs(student, support.TOKENS) + shift
  scores = support.scores_of(
    objective.needs,
    {"student": student, "teacher": support.TEACHER_LOGITS},
    support.TOKENS,
    support.MASK,
    behavior,
    start=behavior,
  )
  terms, statistics = objective.terms(scores, base.Signals())
  return {
    name: np.where(support.MASK, term.loss, 0.0)
    for name, term in {**terms, **statistics}.items()
  }


def test_worked_terms():
  found = _terms(_create())
  np.testing.assert_allclose(
    found["advantage"],
    [[0.394989, 0.384610, -3.840821], [0.185045, 0.111700, 0.0]],
    atol=1e-5,
  )
  np.testing.assert_allclose(
    found["policy"],
    [[-0.375725, -0.425060, 3.144599], [-0.185045, -0.134041, 0.0]],
    atol=1e-5,
  )
  # The teacher's entropies: 0.878, 0.730, 0.982, 1.281, 1.163.
  np.testing.assert_array_equal(found["gate"], [[1, 0, 1], [1, 1, 0]])
  np.testing.assert_allclose(
    found["forward_kl"],
    [[0.494713, 0.0, 2.029088], [0.704272, 0.416991, 0.0]],
    atol=1e-5,
  )


@pytest.mark.parametrize(
  ("options", "shift", "expected"),
  [
    ({}, 1.0, 1.133958),
    ({"reduction": "seq_mean_token_mean"}, 1.0, 1.011813),
    ({}, 0.0, 1.311908),
    # 0.404946 + c 0.729013.
    ({"coefficient": 3.0}, 1.0, 2.591985),
    # All gates shut: the policy gradient alone.
    ({"entropy_threshold": 2.0}, 1.0, 0.404946),
  ],
)
def test_worked_numbers(options, shift, expected):
  loss = support.fixture_loss(
    _create(**options), shift=shift * support.BEHAVIOR_SHIFT, drew=True
  )
  np.testing.assert_allclose(loss, expected, atol=1e-5)


def test_worked_gradient():
  """Position (1, 1) is clipped: only the forward KL's gradient is left."""
  objective = _create()
  gradient = jax.grad(lambda z: support.fixture_loss(objective, z, drew=True))(
    support.STUDENT_LOGITS
  )
  np.testing.assert_allclose(
    gradient,
    [
      [
        [-0.113454, 0.075941, 0.027937, 0.009576],
        [0.013755, 0.008343, -0.034543, 0.012446],
        [-0.187432, 0.324344, -0.068952, -0.067960],
      ],
      [
        [0.059252, -0.055636, 0.059252, -0.062868],
        [0.006412, -0.040381, 0.047377, -0.013407],
        [0.0, 0.0, 0.0, 0.0],
      ],
    ],
    atol=1e-6,
  )


def test_gradient_is_the_closed_form_on_policy():
  """r A (p_S - onehot(y)) + coefficient gate (p_S - q), per token, r = 1."""
  objective = _create(coefficient=0.5, reduction="sum")
  no_shift = jnp.zeros_like(support.BEHAVIOR_SHIFT)
  gradient = jax.grad(
    lambda z: support.fixture_loss(objective, z, shift=no_shift)
  )(support.STUDENT_LOGITS)
  student, teacher = (
    np.asarray(jax.nn.softmax(z, axis=-1), np.float64)
    for z in (support.STUDENT_LOGITS, support.TEACHER_LOGITS)
  )
  onehot = np.eye(4)[np.asarray(support.TOKENS)]
  advantage = np.log((teacher * onehot).sum(-1) / (student * onehot).sum(-1))
  least = np.sort(teacher, axis=-1)[..., 2:3]
  q = np.where(teacher >= least, teacher, 0.0)
  q /= q.sum(-1, keepdims=True)
  gate = -(teacher * np.log(teacher)).sum(-1) > 0.8
  expected = advantage[..., None] * (student - onehot)
  expected += 0.5 * gate[..., None] * (student - q)
  expected *= np.asarray(support.MASK)[..., None]
  np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_the_gate_is_shut_at_the_threshold():
  """Strictly above: a teacher of entropy log 4 exactly, and a hair below."""
  entropy = float(jnp.log(4.0))
  mask, tokens = jnp.ones((1, 1), bool), jnp.zeros((1, 1), jnp.int32)

  def gate(threshold):
    objective = _create(entropy_threshold=threshold)
    scores = support.scores_of(
      objective.needs,
      {"student": jnp.zeros((1, 1, 4)), "teacher": jnp.zeros((1, 1, 4))},
      tokens,
      mask,
      jnp.full((1, 1), -entropy),
    )
    exact = float(scores.teacher.entropy[0, 0])
    _, statistics = objective.terms(scores, base.Signals())
    return exact, float(statistics["gate"].loss[0, 0])

  exact, _ = gate(0.0)
  assert gate(exact) == (exact, 0.0)
  assert gate(exact - 1e-5) == (exact, 1.0)


@pytest.mark.parametrize(
  ("options", "named"),
  [
    ({"entropy_threshold": -0.1}, "entropy_threshold must be >= 0 nats"),
    ({"coefficient": 0.0}, "without the forward KL the objective is opd_k1"),
    ({"clip": 1.0}, r"clip must be in \(0, 1\), got 1.0"),
    ({"top_k": 0}, "needs top_k >= 1.*; set it to some of"),
    ({"reduction": "mean"}, "reduction must be one of"),
  ],
)
def test_bad_options_are_named(options, named):
  with pytest.raises(InputError, match=named):
    _create(**options)


def test_more_ids_than_there_are():
  with pytest.raises(InputError, match=r"objective eopd: top_k must be in \[1"):
    _create(top_k=16).check_vocabulary(15)
  _create(top_k=16).check_vocabulary(16)
