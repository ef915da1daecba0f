"""gkd: worked numbers, closed-form gradients, and the ends of beta."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import objectives
from opd_jax.errors import InputError
from opd_jax.objectives import divergences
from tests.objectives import support


def _create(**options):
  return objectives.create({"name": "gkd", **options})


@pytest.mark.parametrize(
  ("beta", "token_mean", "seq_mean"),
  [
    (0.0, 0.396982, 0.348290),
    (1.0, 0.587683, 0.506322),
    (0.1, 0.034713, 0.030479),
    (0.5, 0.097011, 0.085008),
    (0.9, 0.043332, 0.037599),
  ],
)
def test_worked_numbers(beta, token_mean, seq_mean):
  np.testing.assert_allclose(
    support.fixture_loss(_create(beta=beta)), token_mean, atol=1e-5
  )
  np.testing.assert_allclose(
    support.fixture_loss(_create(beta=beta, reduction="seq_mean_token_mean")),
    seq_mean,
    atol=1e-5,
  )


@pytest.mark.parametrize(
  ("beta", "expected"),
  [
    (0.0, [-0.520723, 0.691473, -0.191563, 0.020813]),
    (1.0, [-0.405783, 0.907196, -0.149279, -0.352134]),
    (0.1, [-0.039000, 0.054018, -0.014347, -0.000671]),
    (0.5, [-0.077991, 0.126039, -0.028691, -0.019357]),
    (0.9, [-0.029241, 0.058153, -0.010757, -0.018156]),
  ],
)
def test_gradient(beta, expected):
  objective = _create(beta=beta)
  gradient = jax.grad(lambda z: support.fixture_loss(objective, z))(
    support.STUDENT_LOGITS
  )
  np.testing.assert_allclose(5 * gradient[0, 2], expected, atol=1e-5)
  np.testing.assert_array_equal(gradient[1, 2], np.zeros(4))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_equal_models_have_no_loss_and_no_gradient(beta):
  logprobs = jax.nn.log_softmax(support.TEACHER_LOGITS, axis=-1)

  def total(logits):
    student = jax.nn.log_softmax(logits, axis=-1)
    return jnp.sum(divergences.generalized_jsd(student, logprobs, beta))

  value, gradient = jax.value_and_grad(total)(support.TEACHER_LOGITS)
  np.testing.assert_allclose(value, 0.0, atol=1e-6)
  np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


@pytest.mark.parametrize("beta", [-0.1, 1.1])
def test_beta_outside_the_unit_interval(beta):
  with pytest.raises(InputError, match=f"beta must be in .0, 1., got {beta}"):
    _create(beta=beta)


@pytest.mark.parametrize(
  ("options", "token_mean", "seq_mean"),
  [
    ({"divergence": "forward_kl"}, 0.396982, 0.348290),
    ({"divergence": "reverse_kl"}, 0.587683, 0.506322),
    ({"divergence": "skew_forward_kl", "alpha": 0.1}, 0.306089, 0.268864),
    ({"divergence": "skew_reverse_kl", "alpha": 0.1}, 0.342742, 0.298998),
    (
      {"beta": 0.0, "support": "teacher_top_k", "top_k": 2},
      0.352946,
      0.308694,
    ),
    (
      {"beta": 1.0, "support": "teacher_top_k", "top_k": 2},
      0.353799,
      0.308267,
    ),
    (
      {
        "beta": 0.0,
        "support": "teacher_top_k",
        "top_k": 2,
        "normalization": "none",
      },
      0.491894,
      0.439070,
    ),
    (
      {
        "beta": 0.0,
        "support": "teacher_top_k",
        "top_k": 2,
        "normalization": "teacher_renormalized",
      },
      0.803144,
      0.762725,
    ),
    (
      {
        "beta": 1.0,
        "support": "teacher_top_k",
        "top_k": 2,
        "normalization": "renormalized",
      },
      0.023851,
      0.027735,
    ),
    # Twice the "mixed" KL of NeMo-RL, half forward and half reverse.
    (
      {
        "divergence": "jeffreys",
        "support": "teacher_top_k",
        "top_k": 2,
        "normalization": "renormalized",
      },
      2 * 0.025695,
      2 * 0.030128,
    ),
  ],
)
def test_worked_numbers_of_the_options(options, token_mean, seq_mean):
  np.testing.assert_allclose(
    support.fixture_loss(_create(**options)), token_mean, atol=1e-5
  )
  np.testing.assert_allclose(
    support.fixture_loss(_create(**options, reduction="seq_mean_token_mean")),
    seq_mean,
    atol=1e-5,
  )


def test_temperature_is_that_of_both_models():
  """Logits over 2, without a factor 4: 0.131757."""
  loss, _ = support.loss_of(
    _create(beta=0.0),
    {
      "student": support.STUDENT_LOGITS / 2,
      "teacher": support.TEACHER_LOGITS / 2,
    },
    support.TOKENS,
    support.MASK,
    jnp.zeros((2, 3)),
  )
  np.testing.assert_allclose(loss, 0.131757, atol=1e-5)


@pytest.mark.parametrize(
  ("options", "named"),
  [
    ({"divergence": "kl"}, "divergence must be one of forward_kl"),
    ({"divergence": "le_cam", "beta": 0.5}, "beta = 0.5 is a parameter of"),
    ({"alpha": 0.1}, "alpha = 0.1 is a parameter of the divergences skew"),
    ({"divergence": "alpha"}, "has a parameter alpha, and none was given"),
    ({"top_k": 8}, "top_k = 8 has no meaning over the whole vocabulary"),
    ({"support": "top_k"}, "objective.support must be one of 'vocabulary'"),
    ({"support": "union"}, "support 'union' needs top_k >= 1"),
    (
      {"support": "union", "top_k": 1, "normalization": "renormalized"},
      "the divergence is 0 whatever the student",
    ),
    (
      {"support": "teacher_top_k", "top_k": 8, "normalization": "none"},
      "objective gkd: divergence 'jsd' falls as the student's mass leaves",
    ),
    ({"reduction": "mean"}, "reduction must be one of"),
  ],
)
def test_bad_options_are_named(options, named):
  with pytest.raises(InputError, match=named):
    _create(**options)


def test_more_ids_than_there_are():
  objective = _create(support="student_top_k", top_k=16)
  with pytest.raises(
    InputError, match=r"objective gkd: top_k must be in \[1, V=15\], got 16"
  ):
    objective.check_vocabulary(15)
  objective.check_vocabulary(16)
  _create().check_vocabulary(1)


def test_unknown_objective_lists_the_known():
  with pytest.raises(InputError, match=r"known: .*gkd, .*opd_k1"):
    objectives.create({"name": "gdk"})
