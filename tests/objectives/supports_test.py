"""Supports: worked numbers and gradients of K = 2, and what holds of any K."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.errors import InputError
from opd_jax.objectives import supports
from opd_jax.objectives.divergences import Divergence
from opd_jax.objectives.supports import Support
from opd_jax.types import MASKED_LOGPROB
from tests.objectives import divergences_test
from tests.objectives import support as fixture

FORWARD = Divergence(name="forward_kl")
REVERSE = Divergence(name="reverse_kl")
NORMALIZATIONS = ("tail", "renormalized", "teacher_renormalized", "none")
NAMES = ("teacher_top_k", "student_top_k", "union")


def logprobs(logits):
  return jax.nn.log_softmax(logits, axis=-1)


def _of(normalization, name="teacher_top_k", top_k=2):
  return Support(name=name, top_k=top_k, normalization=normalization)


def _per_token(support, divergence, student=fixture.STUDENT_LOGITS):
  found = support.divergence(
    divergence, logprobs(student), logprobs(fixture.TEACHER_LOGITS)
  )
  return jnp.where(fixture.MASK, found, 0.0)


@pytest.mark.parametrize(
  ("divergence", "normalization", "expected"),
  [
    (FORWARD, "none", [[0.307271, 0.233633, 1.568666], [0.252623, 0.097276]]),
    (
      FORWARD,
      "teacher_renormalized",
      [[0.494713, 0.370657, 2.029088], [0.704272, 0.416991]],
    ),
    (
      FORWARD,
      "renormalized",
      [[0.020636, 0.002209, 0.0], [0.011125, 0.103730]],
    ),
    (FORWARD, "tail", [[0.168584, 0.120648, 1.300635], [0.096089, 0.078777]]),
    (
      REVERSE,
      "renormalized",
      [[0.022622, 0.002321, 0.0], [0.011208, 0.083103]],
    ),
    (REVERSE, "tail", [[0.205024, 0.157339, 1.245421], [0.099491, 0.061721]]),
  ],
)
def test_worked_numbers(divergence, normalization, expected):
  found = _per_token(_of(normalization), divergence)
  np.testing.assert_allclose(
    found, [expected[0], [*expected[1], 0.0]], atol=1e-6
  )


@pytest.mark.parametrize(
  ("divergence", "normalization", "expected"),
  [
    (FORWARD, "none", [-0.535740, 0.599141, -0.197088, 0.133686]),
    (
      FORWARD,
      "teacher_renormalized",
      [-0.634957, 0.710100, -0.233588, 0.158445],
    ),
    (FORWARD, "renormalized", [0.0, 0.0, 0.0, 0.0]),
    (FORWARD, "tail", [-0.520723, 0.582347, -0.191563, 0.129939]),
    (REVERSE, "tail", [-0.298357, 0.333665, -0.109759, 0.074451]),
  ],
)
def test_worked_gradient(divergence, normalization, expected):
  gradient = jax.grad(
    lambda z: jnp.sum(_per_token(_of(normalization), divergence, z))
  )(fixture.STUDENT_LOGITS)
  np.testing.assert_allclose(gradient[0, 2], expected, atol=1e-6)


def _closed_form(normalization, s, t, inside):
  """d FKL / dz, with s and t probabilities and S a choice of columns."""
  in_s = inside.astype(s.dtype)
  t_mass = np.sum(t * in_s, axis=-1, keepdims=True)
  s_mass = np.sum(s * in_s, axis=-1, keepdims=True)
  tail = s / (1 - s_mass) * ((1 - s_mass) - (1 - t_mass))
  return {
    "none": s * t_mass - t * in_s,
    "teacher_renormalized": s - t / t_mass * in_s,
    "renormalized": (s / s_mass - t / t_mass) * in_s,
    "tail": np.where(inside, s - t, tail),
  }[normalization]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_gradient_is_the_closed_form(name, normalization):
  student, teacher = jax.random.normal(jax.random.key(3), (2, 20, 9)) * 2.0
  s, t = (
    np.asarray(jax.nn.softmax(z, axis=-1), np.float64)
    for z in (student, teacher)
  )

  def largest(p):
    return p >= np.sort(p, axis=-1)[..., -3:-2]

  inside = {
    "teacher_top_k": largest(t),
    "student_top_k": largest(s),
    "union": largest(t) | largest(s),
  }[name]
  gradient = jax.grad(
    lambda z: jnp.sum(
      _of(normalization, name, 3).divergence(
        FORWARD, logprobs(z), logprobs(teacher)
      )
    )
  )(student)
  np.testing.assert_allclose(
    gradient, _closed_form(normalization, s, t, inside), atol=2e-6
  )


@divergences_test.every_divergence
def test_tail_is_a_lower_bound_that_grows_with_k(divergence):
  student, teacher = jax.random.normal(jax.random.key(1), (2, 40, 12)) * 1.5
  student, teacher = logprobs(student), logprobs(teacher)
  whole = divergence(student, teacher)
  for name in ("teacher_top_k", "student_top_k"):
    values = [
      _of("tail", name, top_k).divergence(divergence, student, teacher)
      for top_k in (1, 2, 5, 11, 12)
    ]
    for less, more in zip(values, [*values[1:], whole], strict=True):
      # Relative to the largest: chi-squares are large.
      slack = 1e-5 * jnp.maximum(1.0, jnp.abs(whole))
      assert jnp.all(less <= more + slack)
    assert jnp.mean(values[0]) < jnp.mean(values[2])
    assert jnp.min(values[0]) >= -1e-6


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@divergences_test.every_divergence
def test_all_ids_are_the_whole_vocabulary(divergence, normalization):
  student = logprobs(divergences_test.STUDENT)
  teacher = logprobs(divergences_test.TEACHER)
  found = _of(normalization, "union", 4).divergence(
    divergence, student, teacher
  )
  np.testing.assert_allclose(
    found, divergence(student, teacher), rtol=1e-5, atol=1e-6
  )


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_masked_columns_count_for_nothing(normalization):
  """Ids no model may use are in no support, and their tail has no mass."""
  student = logprobs(divergences_test.STUDENT)
  teacher = logprobs(divergences_test.TEACHER)
  masked = jnp.full((3, 5), MASKED_LOGPROB)
  for top_k in (2, 4):
    support = _of(normalization, "union", top_k)

    def wide(student, teacher=teacher, support=support):
      return support.divergence(
        FORWARD,
        jnp.concatenate([student, masked], axis=-1),
        jnp.concatenate([teacher, masked], axis=-1),
      )

    np.testing.assert_allclose(
      wide(student), support.divergence(FORWARD, student, teacher), atol=1e-6
    )
    slope = jax.grad(lambda s: jnp.sum(wide(s)))(student)
    assert np.all(np.isfinite(slope))


def test_a_small_tail_keeps_its_digits():
  """A tail of 1e-6 against one of 1e-7: 1 - sum of the rest has lost both.

  The forward KL of the two buckets is 1e-6 log 10 - (1e-6 - 1e-7), and its
  gradient in the tail's logit the difference of the masses, -9e-7.
  """
  student = jnp.log(jnp.array([1.0, 1e-7]))
  teacher = logprobs(jnp.log(jnp.array([1.0, 1e-6])))
  support = _of("tail", top_k=1)

  def tail(z):
    return support.divergence(FORWARD, logprobs(z), teacher)

  slope = jax.grad(tail)(student)
  np.testing.assert_allclose(slope[1], -9e-7, rtol=1e-2)


def test_renormalized_is_blind_to_the_mass_on_the_support():
  """The pitfall: the student puts next to nothing where the teacher is."""
  teacher = jnp.log(jnp.array([0.5, 0.4, 0.05, 0.05]))
  student = jnp.log(jnp.array([0.005, 0.004, 0.5, 0.491]))
  values = {
    normalization: float(
      _of(normalization).divergence(FORWARD, student, teacher)
    )
    for normalization in NORMALIZATIONS
  }
  np.testing.assert_allclose(values["renormalized"], 0.0, atol=1e-6)
  # 0.9 log(0.9 / 0.009) + 0.1 log(0.1 / 0.991).
  np.testing.assert_allclose(values["tail"], 3.915299, atol=1e-5)


def test_without_normalization_the_value_may_be_negative():
  """No clamp at 0, which would remove the gradient there.

  A student with more than the teacher's mass on the one id of the support:
  0.6 log(0.6 / 0.8) = -0.172609, and the slope in its log-probability -0.6.
  """
  teacher = jnp.log(jnp.array([0.6, 0.1, 0.2, 0.1]))
  student = jnp.log(jnp.array([0.8, 0.05, 0.1, 0.05]))
  support = Support(name="student_top_k", top_k=1, normalization="none")
  found = support.divergence(FORWARD, student, teacher)
  np.testing.assert_allclose(found, -0.172609, atol=1e-6)
  slope = jax.grad(lambda s: support.divergence(FORWARD, s, teacher))(student)
  np.testing.assert_allclose(slope, [-0.6, 0.0, 0.0, 0.0], rtol=1e-5)


def test_ties_go_to_the_lowest_ids():
  columns = supports.top_k_columns(jnp.array([[1.0, 2.0, 1.0, 1.0, 2.0]]), 3)
  np.testing.assert_array_equal(columns, [[True, True, False, False, True]])
  equal = supports.top_k_columns(jnp.zeros((1, 4)), 2)
  np.testing.assert_array_equal(equal, [[True, True, False, False]])


def test_supports_are_those_of_a_sort():
  student, teacher = jax.random.normal(jax.random.key(0), (2, 30, 17))

  def largest(array):
    order = np.argsort(-np.asarray(array), axis=-1, kind="stable")[:, :5]
    return np.any(order[:, :, None] == np.arange(17), axis=1)

  for name, expected in (
    ("teacher_top_k", largest(teacher)),
    ("student_top_k", largest(student)),
    ("union", largest(teacher) | largest(student)),
  ):
    found = _of("tail", name, 5).columns(student, teacher)
    np.testing.assert_array_equal(found, expected)


def test_statistics_are_the_masses_on_the_support():
  student, teacher = (
    logprobs(z) for z in (fixture.STUDENT_LOGITS, fixture.TEACHER_LOGITS)
  )
  found = _of("none").statistics(student, teacher)
  for name, expected in (
    ("teacher_mass", [[0.868545, 0.895935, 0.843741], [0.706880, 0.750260]]),
    ("student_mass", [[0.622459, 0.691807, 0.131455], [0.5, 0.731059]]),
  ):
    np.testing.assert_allclose(found[name].loss[0], expected[0], atol=1e-6)
    np.testing.assert_allclose(found[name].loss[1, :2], expected[1], atol=1e-6)
  assert Support().statistics(student, teacher) == {}


@pytest.mark.parametrize(
  ("options", "named"),
  [
    ({"top_k": 4}, "top_k = 4 has no meaning over the whole vocabulary"),
    ({"normalization": "tail"}, "normalization = 'tail' has no meaning"),
    ({"name": "union", "normalization": "tail"}, "needs top_k >= 1"),
    (
      {"name": "union", "normalization": "tail", "top_k": 0},
      "needs top_k >= 1, the number of ids, got 0",
    ),
    ({"name": "teacher_top_k", "top_k": 2}, "needs a normalization"),
    (
      {"name": "teacher_top_k", "top_k": 1, "normalization": "renormalized"},
      "the divergence is 0 whatever the student",
    ),
  ],
)
def test_bad_supports_are_named(options, named):
  with pytest.raises(InputError, match=named):
    Support(**options)


@pytest.mark.parametrize(
  "divergence",
  [
    REVERSE,
    Divergence(name="jsd", beta=1.0),
    Divergence(name="skew_reverse_kl", alpha=0.1),
    Divergence(name="alpha", alpha=0.0),
  ],
  ids=divergences_test.words,
)
@pytest.mark.parametrize("normalization", ["none", "teacher_renormalized"])
def test_a_divergence_that_empties_the_support_is_refused(
  divergence, normalization
):
  with pytest.raises(InputError, match="as the student's mass leaves"):
    _of(normalization).check(divergence)
  _of("tail").check(divergence)


@divergences_test.every_divergence
def test_those_that_are_refused_are_those_that_do(divergence):
  """The slope in a student's column that equals the teacher's, by autodiff."""
  column = jnp.log(jnp.array([0.3]))
  slope = jax.grad(divergence)(column, column)[0]
  assert (float(slope) > 1e-4) == divergence.sheds_mass


def test_more_ids_than_there_are():
  support = _of("tail", top_k=5)
  support.check_vocabulary(5)
  with pytest.raises(InputError, match=r"top_k must be in \[1, V=4\], got 5"):
    support.check_vocabulary(4)
