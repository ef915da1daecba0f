"""reopold: floors, the numbers of its three variants, gradients, the switch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import objectives
from opd_jax.errors import InputError
from tests.objectives import support

REFINING = 5  # Of 10 steps: behind the switch.


def _create(**options):
  if options.get("variant") != "clip_only":
    options = {"keep": 0.4, **options}
  return objectives.create({"name": "reopold", **options})


@pytest.mark.parametrize(
  ("lam", "log_ratio", "logit"),
  [
    (0.1, -2.558428, -2.197225),
    (0.2, -2.011797, -1.386294),
    (0.3, -1.719961, -0.847298),
    (0.5, -1.386294, 0.0),
  ],
)
def test_floors(lam, log_ratio, logit):
  floors = [
    _create(lam=lam, floor_form=form).config.floor
    for form in ("log_ratio", "logit")
  ]
  np.testing.assert_allclose(floors, [log_ratio, logit], atol=1e-6)


@pytest.mark.parametrize(
  ("options", "step", "on_policy", "with_ratio"),
  [
    ({}, 0, -0.181586, -0.167174),
    ({}, REFINING, -0.315017, -0.304166),
    ({"switch": 0.0}, 0, -0.315017, -0.304166),
    ({"switch": 1.0}, 9, -0.181586, -0.167174),
    ({"variant": "clip_only"}, 0, 0.366417, 0.285193),
    ({"variant": "clip_only", "floor_form": "logit"}, 0, 0.294176, None),
    # The fraction 1 tells refinement and entropy_only apart.
    ({"keep": 1.0}, REFINING, 0.366417, 0.285193),
    ({"variant": "entropy_only", "keep": 1.0}, 0, 0.582895, None),
    ({"variant": "entropy_only"}, 0, -0.315017, -0.304166),
    # max(A, -1) of the rewards 0.444989, 0.284610, -3.6, 0.185045, -0.188300.
    (
      {"variant": "clip_only", "floor_form": "fixed", "fixed_floor": -1.0},
      0,
      -(0.444989 + 0.284610 - 1.0 + 0.185045 - 0.188300) / 5,
      None,
    ),
  ],
)
def test_worked_numbers(options, step, on_policy, with_ratio):
  objective = _create(**options)
  loss = support.fixture_loss(objective, shift=support.NO_SHIFT, step=step)
  np.testing.assert_allclose(loss, on_policy, atol=1e-5)
  if with_ratio is not None:
    loss = support.fixture_loss(objective, step=step)
    np.testing.assert_allclose(loss, with_ratio, atol=1e-5)


@pytest.mark.parametrize(
  ("step", "expected"),
  [
    (
      0,
      [
        [
          [-0.060624, 0.030705, 0.011296, 0.018623],
          [0.011512, 0.006982, -0.028911, 0.010417],
          [0.0, 0.0, 0.0, 0.0],
        ],
        [
          [0.011565, 0.011565, 0.011565, -0.034696],
          [-0.001509, -0.004102, -0.011151, 0.016763],
          [0.0, 0.0, 0.0, 0.0],
        ],
      ],
    ),
    (
      REFINING,
      [
        [[-0.121247, 0.061409, 0.022591, 0.037247], [0.0] * 4, [0.0] * 4],
        [[0.023131, 0.023131, 0.023131, -0.069392], [0.0] * 4, [0.0] * 4],
      ],
    ),
  ],
)
def test_gradient_of_both_stages(step, expected):
  gradient = jax.grad(
    lambda z: support.fixture_loss(
      _create(), z, shift=support.NO_SHIFT, step=step
    )
  )(support.STUDENT_LOGITS)
  np.testing.assert_allclose(gradient, expected, atol=1e-5)


@pytest.mark.parametrize("floor", [-2.558428, -1.0])
def test_gradient_is_the_closed_form(floor):
  """d loss_t / dz = ratio max(R, floor) (p_S - onehot(y)) / N."""
  objective = _create(
    variant="clip_only", floor_form="fixed", fixed_floor=floor
  )
  gradient = jax.grad(lambda z: support.fixture_loss(objective, z))(
    support.STUDENT_LOGITS
  )
  student = support.token_logprobs(support.STUDENT_LOGITS, support.TOKENS)
  teacher = support.token_logprobs(support.TEACHER_LOGITS, support.TOKENS)
  ratio = jnp.exp(-support.BEHAVIOR_SHIFT)
  onehot = jnp.eye(4, dtype=jnp.float32)[support.TOKENS]
  probabilities = jax.nn.softmax(support.STUDENT_LOGITS, axis=-1)
  factor = jnp.where(
    support.MASK, ratio * jnp.maximum(teacher - student, floor) / 5.0, 0.0
  )
  np.testing.assert_allclose(
    gradient, factor[..., None] * (probabilities - onehot), atol=1e-6
  )


@pytest.mark.parametrize("lam", [0.1, 0.3, 0.7])
def test_the_floor_is_a_bound_of_the_mixture(lam):
  """log(mixture / student) >= (1 - lam) max(R, floor), for any R."""
  rewards = np.linspace(-30.0, 10.0, 401)
  floor = _create(lam=lam).config.floor
  mixture = np.log(lam + (1 - lam) * np.exp(rewards))
  assert np.all(mixture >= (1 - lam) * np.maximum(rewards, floor) - 1e-9)


def test_the_first_stage_drops_what_it_would_clip():
  """With a teacher that finds every token unlikely nothing is left: 0."""
  unlikely = support.STUDENT_LOGITS - 50.0 * jax.nn.one_hot(support.TOKENS, 4)
  objective = _create()

  def loss(logits, step):
    return support.fixture_loss(objective, logits, step=step, teacher=unlikely)

  value, gradient = jax.value_and_grad(loss)(support.STUDENT_LOGITS, 0)
  assert value == 0.0
  np.testing.assert_array_equal(gradient, 0.0)
  assert loss(support.STUDENT_LOGITS, REFINING) > 0


@pytest.mark.parametrize(
  ("options", "named"),
  [
    ({"lam": 0.0}, "lam must be in .0, 1."),
    ({"lam": 1.0}, "lam must be in .0, 1."),
    ({"lam": 0.6, "floor_form": "logit"}, "must be <= 0 and finite, got 0.40"),
    ({"floor_form": "fixed"}, "which needs it; got fixed_floor=None"),
    ({"fixed_floor": -1.0}, "fixed_floor is for floor_form"),
    ({"floor_form": "fixed", "fixed_floor": 0.5}, "must be <= 0"),
    ({"keep": 0.0}, "keep must be in"),
    ({"switch": 1.1}, "switch must be in .0, 1., a fraction of the run"),
    ({"variant": "clip"}, "objective.variant must be one of"),
    ({"variant": "clip_only", "keep": 0.3}, "keep = 0.3 has no effect"),
    ({"variant": "clip_only", "switch": 0.3}, "switch = 0.3 has no effect"),
    ({"variant": "entropy_only", "switch": 0.3}, "switch = 0.3 has no effect"),
    ({"variant": "entropy_only", "lam": 0.3}, "lam = 0.3 has no effect"),
    (
      {"floor_form": "fixed", "fixed_floor": -1.0, "lam": 0.3},
      "lam = 0.3 has no effect .*floor_form='fixed'",
    ),
  ],
)
def test_bad_options_are_named(options, named):
  with pytest.raises(InputError, match=named):
    _create(**options)
