"""Every divergence: worked numbers, definition, gradient, bounds and limits."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.errors import InputError
from opd_jax.objectives import divergences
from opd_jax.objectives.divergences import Divergence
from opd_jax.types import MASKED_LOGPROB

# The fixture of the survey's specification: three positions of four ids.
STUDENT = jnp.array(
  [[1.0, 0.5, 0.0, -1.0], [0.2, 0.1, 0.0, -0.1], [2.0, -1.0, 0.0, 0.5]]
)
TEACHER = jnp.array(
  [[0.0, 1.5, 0.5, -1.0], [0.5, 0.0, -0.5, 1.0], [1.0, 0.0, 0.5, -0.5]]
)

PLAIN = (
  "forward_kl",
  "reverse_kl",
  "jeffreys",
  "total_variation",
  "squared_hellinger",
  "pearson_chi_square",
  "neyman_chi_square",
  "le_cam",
)
ALL = (
  *(Divergence(name=name) for name in PLAIN),
  Divergence(name="jsd", beta=0.5),
  Divergence(name="jsd", beta=0.9),
  Divergence(name="jsd", beta=0.0),
  Divergence(name="jsd", beta=1.0),
  Divergence(name="skew_forward_kl", alpha=0.1),
  Divergence(name="skew_reverse_kl", alpha=0.1),
  Divergence(name="skew_forward_kl", alpha=0.0),
  Divergence(name="skew_reverse_kl", alpha=0.0),
  *(
    Divergence(name="alpha", alpha=alpha)
    for alpha in (-1.0, 0.0, 0.5, 1.0, 1.5, 2.0)
  ),
)


def words(divergence):
  if not isinstance(divergence, Divergence):
    return ""
  parameter = divergence.beta
  if parameter is None:
    parameter = divergence.alpha
  return f"{divergence.name}-{parameter}"


every_divergence = pytest.mark.parametrize("divergence", ALL, ids=words)


def logprobs(logits):
  return jax.nn.log_softmax(logits, axis=-1)


@pytest.mark.parametrize(
  ("divergence", "expected"),
  [
    (Divergence(name="forward_kl"), [0.306163, 0.171049, 0.303828]),
    (Divergence(name="reverse_kl"), [0.367423, 0.167268, 0.230129]),
    (Divergence(name="jeffreys"), [0.673586, 0.338317, 0.533957]),
    (Divergence(name="jsd", beta=0.5), [0.080227, 0.041312, 0.063251]),
    (Divergence(name="jsd", beta=0.9), [0.031832, 0.014958, 0.021020]),
    (Divergence(name="total_variation"), [0.355713, 0.241216, 0.311954]),
    (Divergence(name="squared_hellinger"), [0.082144, 0.041794, 0.064919]),
    (Divergence(name="pearson_chi_square"), [0.594926, 0.383203, 0.942053]),
    (Divergence(name="neyman_chi_square"), [1.045057, 0.359915, 0.396268]),
    (Divergence(name="le_cam"), [0.307008, 0.161565, 0.241264]),
    (Divergence(name="alpha", alpha=0.5), [0.328578, 0.167174, 0.259675]),
    (Divergence(name="alpha", alpha=2.0), [0.297463, 0.191602, 0.471027]),
    (
      Divergence(name="skew_forward_kl", alpha=0.1),
      [0.250368, 0.135708, 0.223695],
    ),
    (
      Divergence(name="skew_reverse_kl", alpha=0.1),
      [0.276633, 0.133901, 0.192147],
    ),
  ],
  ids=words,
)
def test_worked_numbers(divergence, expected):
  found = divergence(logprobs(STUDENT), logprobs(TEACHER))
  np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("forward_kl", [0.340627, -0.310205, -0.045508, 0.015086]),
    ("reverse_kl", [0.426916, -0.316042, -0.104503, -0.006371]),
    ("total_variation", [0.218918, -0.154709, -0.093836, 0.029627]),
    ("squared_hellinger", [0.091816, -0.075326, -0.017880, 0.001389]),
    ("pearson_chi_square", [0.718457, -0.784089, 0.000845, 0.064787]),
  ],
)
def test_worked_gradient(name, expected):
  gradient = _gradient(Divergence(name=name), STUDENT[0], TEACHER[0])
  np.testing.assert_allclose(gradient, expected, atol=1e-6)


def _gradient(divergence, student, teacher):
  return jax.grad(lambda z: divergence(logprobs(z), logprobs(teacher)))(student)


def _g(divergence, u):
  """f(u) - u f'(u), by hand for each generator f."""
  name, a = divergence.name, divergence.alpha
  if name == "jsd" and divergence.beta not in (0.0, 1.0):
    beta = divergence.beta
    return -(1 - beta) * np.log(beta * u + 1 - beta)
  if name in ("skew_forward_kl", "skew_reverse_kl") and a == 0:
    name = name.removeprefix("skew_")
  if name in ("jsd", "alpha") and (divergence.beta, a) in (
    (0.0, None),
    (None, 1.0),
  ):
    name = "forward_kl"
  if name in ("jsd", "alpha") and (divergence.beta, a) in (
    (1.0, None),
    (None, 0.0),
  ):
    name = "reverse_kl"
  return {
    "forward_kl": lambda: -u,
    "reverse_kl": lambda: 1 - np.log(u),
    "jeffreys": lambda: 1 - u - np.log(u),
    "total_variation": lambda: 0.5 * np.sign(1 - u),
    "squared_hellinger": lambda: 0.5 * (1 - np.sqrt(u)),
    "pearson_chi_square": lambda: 1 - u**2,
    "neyman_chi_square": lambda: 2 / u - 2,
    # f = (u - 1)^2 / (u + 1), f' = (u - 1)(u + 3) / (u + 1)^2.
    "le_cam": lambda: (
      (u - 1) ** 2 / (u + 1) - u * (u - 1) * (u + 3) / (u + 1) ** 2
    ),
    "alpha": lambda: -(u**a) / a,
    # f = u log(u / (a u + 1 - a)), f' = f / u + 1 - a u / (a u + 1 - a).
    "skew_forward_kl": lambda: -u * (1 - a) / (a * u + 1 - a),
    # f = -log((1 - a) u + a), f' = -(1 - a) / ((1 - a) u + a).
    "skew_reverse_kl": lambda: (
      -np.log((1 - a) * u + a) + u * (1 - a) / ((1 - a) * u + a)
    ),
  }[name]()


@every_divergence
def test_gradient_is_the_closed_form(divergence):
  """d D / d z_j = s_j (g_j - sum_i s_i g_i), g = f(u) - u f'(u), u = t / s."""
  for row in range(3):
    s, t = (
      np.asarray(jax.nn.softmax(z[row]), np.float64) for z in (STUDENT, TEACHER)
    )
    g = _g(divergence, t / s)
    np.testing.assert_allclose(
      _gradient(divergence, STUDENT[row], TEACHER[row]),
      s * (g - np.sum(s * g)),
      atol=2e-6,
    )


@every_divergence
def test_it_is_a_divergence(divergence):
  """At least 0; 0 with no slope for equal models, and only there."""
  student, teacher = (
    3.0 * jax.random.normal(jax.random.key(seed), (50, 30)) for seed in (0, 1)
  )
  assert jnp.min(divergence(logprobs(student), logprobs(teacher))) > 0.01
  equal = divergence(logprobs(student), logprobs(student))
  np.testing.assert_allclose(equal, 0.0, atol=2e-6)
  slope = jax.grad(
    lambda z: jnp.sum(divergence(logprobs(z), logprobs(student)))
  )(student)
  np.testing.assert_allclose(slope, 0.0, atol=2e-6)


@every_divergence
def test_masked_columns_and_parts(divergence):
  """Columns no model may use count for nothing; parts add up to the whole."""
  student, teacher = logprobs(STUDENT), logprobs(TEACHER)
  masked = jnp.full((3, 5), MASKED_LOGPROB)
  whole = divergence(student, teacher)

  def wide(student):
    return divergence(
      jnp.concatenate([student, masked], axis=-1),
      jnp.concatenate([teacher, masked], axis=-1),
    )

  np.testing.assert_array_equal(wide(student), whole)
  slope = jax.grad(lambda s: jnp.sum(wide(s)))(student)
  assert np.all(np.isfinite(slope))
  in_masked = jax.grad(lambda m: jnp.sum(divergence(m, masked)))(masked)
  np.testing.assert_array_equal(in_masked, 0.0)
  parts = divergence(student[:, :1], teacher[:, :1]) + divergence(
    student[:, 1:], teacher[:, 1:]
  )
  np.testing.assert_allclose(parts, whole, atol=1e-6)


@pytest.mark.parametrize(
  ("divergence", "bound"),
  [
    (Divergence(name="jsd", beta=0.5), math.log(2)),
    (
      Divergence(name="jsd", beta=0.9),
      -0.9 * math.log(0.9) - 0.1 * math.log(0.1),
    ),
    (Divergence(name="skew_forward_kl", alpha=0.1), -math.log(0.1)),
    (Divergence(name="skew_reverse_kl", alpha=0.1), -math.log(0.1)),
    (Divergence(name="total_variation"), 1.0),
    (Divergence(name="squared_hellinger"), 1.0),
    (Divergence(name="le_cam"), 2.0),
    (Divergence(name="alpha", alpha=0.3), 1 / 0.21),
  ],
  ids=words,
)
def test_bounds_are_reached_by_models_apart(divergence, bound):
  apart = logprobs(jnp.array([[200.0, 0.0], [0.0, 200.0]]))
  found = divergence(apart[0], apart[1])
  np.testing.assert_allclose(found, bound, rtol=1e-5)
  slope = _gradient(divergence, *jnp.array([[200.0, 0.0], [0.0, 200.0]]))
  np.testing.assert_allclose(slope, 0.0, atol=1e-4)


def test_limits_of_alpha():
  student, teacher = logprobs(STUDENT), logprobs(TEACHER)

  def alpha(value):
    return divergences.alpha_divergence(student, teacher, value)

  for value, name, factor in (
    (1.0, "forward_kl", 1.0),
    (0.0, "reverse_kl", 1.0),
    (0.5, "squared_hellinger", 4.0),
    (2.0, "pearson_chi_square", 0.5),
    (-1.0, "neyman_chi_square", 0.5),
  ):
    other = Divergence(name=name)(student, teacher)
    np.testing.assert_allclose(alpha(value), factor * other, rtol=1e-5)
  # Continuous at the ends, where the formula itself is 0 / 0.
  np.testing.assert_allclose(alpha(0.99), alpha(1.0), rtol=0.02)
  np.testing.assert_allclose(alpha(0.01), alpha(0.0), rtol=0.02)


def test_no_bound_is_no_clamp():
  """Where a chi-square leaves float32 it says so, and is exact before."""
  student = jnp.array([0.0, -60.0])
  teacher = jnp.array([-60.0, 0.0])
  found = divergences.pearson_chi_square(student, teacher)
  np.testing.assert_allclose(found, math.exp(60.0), rtol=1e-5)
  far = divergences.pearson_chi_square(student * 2, teacher * 2)
  assert np.isinf(far)


def test_small_differences_survive():
  """The gap of nearly equal models is not lost to 1 - 1.

  p = q (1 + e) on one of two equal halves and q (1 - e) on the other: chi
  square e^2, Hellinger e^2 / 8, with e = 1e-3.
  """
  with jax.enable_x64(True):
    teacher = np.log(np.array([0.5005, 0.4995]))
  student = jnp.log(jnp.array([0.5, 0.5]))
  teacher = jnp.asarray(teacher, jnp.float32)
  for name, expected in (
    ("pearson_chi_square", 1e-6),
    ("squared_hellinger", 1e-6 / 8),
    ("le_cam", 1e-6 / 2),
  ):
    found = Divergence(name=name)(student, teacher)
    np.testing.assert_allclose(found, expected, rtol=2e-3)


@pytest.mark.parametrize(
  ("options", "named"),
  [
    ({"name": "kl"}, "divergence must be one of forward_kl"),
    ({"name": "alpha"}, "has a parameter alpha, and none was given"),
    ({"name": "jsd"}, "has a parameter beta, and none was given"),
    ({"name": "jsd", "beta": 1.5}, r"beta must be in \[0, 1\], got 1.5"),
    ({"name": "jsd", "beta": float("nan")}, "beta must be in"),
    ({"name": "le_cam", "beta": 0.5}, "is a parameter of the divergences jsd"),
    ({"name": "alpha", "alpha": float("inf")}, "alpha must be finite"),
    ({"name": "skew_reverse_kl", "alpha": 1.0}, "the loss is 0 whatever"),
    ({"name": "skew_forward_kl", "alpha": -0.1}, r"must be in \[0, 1\)"),
  ],
)
def test_bad_parameters_are_named(options, named):
  with pytest.raises(InputError, match=named):
    Divergence(**options)
