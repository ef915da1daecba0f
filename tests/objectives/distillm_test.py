"""distillm: worked numbers, worked and closed-form gradients, its bound."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import objectives
from opd_jax.errors import InputError
from tests.objectives import support


def _create(**options):
  return objectives.create({"name": "distillm", **options})


@pytest.mark.parametrize(
  ("divergence", "token_mean", "seq_mean"),
  [
    ("skew_forward_kl", 0.306089, 0.268864),
    ("skew_reverse_kl", 0.342742, 0.298998),
  ],
)
def test_worked_numbers(divergence, token_mean, seq_mean):
  np.testing.assert_allclose(
    support.fixture_loss(_create(divergence=divergence)), token_mean, atol=1e-5
  )
  objective = _create(divergence=divergence, reduction="seq_mean_token_mean")
  np.testing.assert_allclose(
    support.fixture_loss(objective), seq_mean, atol=1e-5
  )


@pytest.mark.parametrize(
  ("divergence", "expected"),
  [
    ("skew_forward_kl", [-0.298872, 0.433474, -0.109949, -0.024653]),
    ("skew_reverse_kl", [-0.236891, 0.429342, -0.087147, -0.105303]),
  ],
)
def test_worked_gradient(divergence, expected):
  objective = _create(divergence=divergence)
  gradient = jax.grad(lambda z: support.fixture_loss(objective, z))(
    support.STUDENT_LOGITS
  )
  np.testing.assert_allclose(5 * gradient[0, 2], expected, atol=1e-5)
  np.testing.assert_array_equal(gradient[1, 2], np.zeros(4))


def test_gradient_is_the_closed_form():
  """d SKL / dz = p_S sum(w) - w, w = (1 - a) p_T p_S / (a p_T + (1 - a) p_S).

  At all positions, for a = 0.3.
  """
  objective = _create(alpha=0.3, reduction="sum")
  gradient = jax.grad(lambda z: support.fixture_loss(objective, z))(
    support.STUDENT_LOGITS
  )
  student, teacher = (
    np.asarray(jax.nn.softmax(z, axis=-1), np.float64)
    for z in (support.STUDENT_LOGITS, support.TEACHER_LOGITS)
  )
  w = 0.7 * teacher * student / (0.3 * teacher + 0.7 * student)
  expected = student * w.sum(-1, keepdims=True) - w
  expected *= np.asarray(support.MASK)[..., None]
  np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_models_apart_reach_the_bound():
  """-log alpha = log 10, where the plain forward KL is 40 nats and more."""
  far = jnp.zeros((2, 3, 4)).at[..., 0].set(50.0)
  logits = {"student": far, "teacher": -far}
  mask = jnp.asarray(support.MASK)
  arguments = (logits, support.TOKENS, mask, jnp.zeros((2, 3)))
  loss, _ = support.loss_of(_create(), *arguments)
  np.testing.assert_allclose(loss, np.log(10.0), rtol=1e-5)
  plain, _ = support.loss_of(_create(alpha=0.0), *arguments)
  assert plain > 40


@pytest.mark.parametrize(
  ("options", "named"),
  [
    ({"alpha": 1.0}, r"alpha of a skewed KL must be in \[0, 1\), got 1.0"),
    ({"alpha": -0.5}, "alpha of a skewed KL"),
    ({"divergence": "jsd"}, "objective.divergence must be one of"),
    ({"reduction": "mean"}, "reduction must be one of"),
  ],
)
def test_bad_options_are_named(options, named):
  with pytest.raises(InputError, match=named):
    _create(**options)
