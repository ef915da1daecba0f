"""What an estimator descends: its expected gradient, exactly, by enumeration.

A table policy over three ids has logits of its own after every prefix; id 0
ends a completion, the third token always does. All 15 completions are
enumerated: the expected gradient of an objective is

  sum_y p(y) grad loss(y)

with p of the student, or of a behavior where a case has one. It is compared
with the gradient of the quantity that the objective's docstring claims, found
by autodiff of that quantity, in float64 to 1e-6. Every registered objective is
in `CASES`.

A quantity is made from two sums over prefixes: `visited` holds the
probabilities of reaching them fixed, `sequence` does not.
"""

import dataclasses
import itertools
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import objectives
from opd_jax.objectives import base, estimators
from tests.objectives import support

VOCAB, LENGTH, STOP = 3, 3, 0
TOLERANCE = 1e-6

# Prefixes that a next token is drawn after, and where each has its row.
PREFIXES = [
  prefix
  for length in range(LENGTH)
  for prefix in itertools.product(range(VOCAB), repeat=length)
  if STOP not in prefix
]
ROW = {prefix: row for row, prefix in enumerate(PREFIXES)}
COMPLETIONS = [
  (*prefix, token)
  for prefix in PREFIXES
  for token in range(VOCAB)
  if token == STOP or len(prefix) == LENGTH - 1
]


def softmax(logits):
  return jax.nn.softmax(logits, axis=-1)


def kl(p, q):
  """Of probabilities; the test's own, as are all formulas below."""
  return jnp.sum(p * (jnp.log(p) - jnp.log(q)))


@dataclasses.dataclass(frozen=True)
class World:
  """Logits of all prefixes, [prefix, id]; `behavior` draws the tokens.

  Those it draws may be `given` to the student, who then has drawn none.
  """

  teacher: Any
  reference: Any
  behavior: Any
  given: bool = False

  def reach(self, logits):
    """The probability that a completion comes by each prefix."""
    chance = softmax(logits)
    found = {}
    for prefix in PREFIXES:
      found[prefix] = jnp.ones(())
      for step in range(len(prefix)):
        row = ROW[prefix[:step]]
        found[prefix] = found[prefix] * chance[row, prefix[step]]
    return found

  def sequence(self, student, quantity):
    """sum over prefixes of p_student(prefix) quantity(student_v, teacher_v)."""
    reach = self.reach(student)
    return sum(
      reach[prefix]
      * quantity(softmax(student[row]), softmax(self.teacher[row]))
      for prefix, row in ROW.items()
    )

  def visited(self, student, quantity):
    """The same with the prefixes' probabilities, of the behavior, fixed."""
    reach = self.reach(jax.lax.stop_gradient(self.behavior))
    return sum(
      reach[prefix]
      * quantity(softmax(student[row]), softmax(self.teacher[row]))
      for prefix, row in ROW.items()
    )


@dataclasses.dataclass(frozen=True)
class Case:
  """An objective's options, and what it descends with them.

  Attributes:
    claim: the quantity, of a world and the student's logits.
    options: besides the name.
    off_policy: the tokens come from a behavior that is not the student.
    moved: that behavior is the student before the first of several updates.
    teacher_mix: the teacher's weight in a mixture that draws the tokens.
    filtered: they are drawn from the two likeliest ids alone.
    given: they come from the teacher, and the student is given them.
    reduction: "sum" makes the loss of a completion the sum over its tokens;
      None for an objective without this option.
    rollouts: completions of the prompt that are enumerated together.
  """

  claim: Callable[[World, Any], Any]
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  off_policy: bool = False
  moved: bool = False
  teacher_mix: float = 0.0
  filtered: bool = False
  given: bool = False
  reduction: str | None = "sum"
  rollouts: int = 1

  def create(self, name):
    options = {"name": name, **self.options}
    if self.reduction is not None:
      options["reduction"] = self.reduction
    return objectives.create(options)


def reverse_kl(student, teacher):
  return kl(student, teacher)


def forward_kl(student, teacher):
  return kl(teacher, student)


def jsd(beta):
  def quantity(student, teacher):
    mixture = beta * teacher + (1 - beta) * student
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)

  return quantity


def skewed(alpha, direction):
  def quantity(student, teacher):
    p, q = (teacher, student) if direction == "forward" else (student, teacher)
    return kl(p, alpha * p + (1 - alpha) * q)

  return quantity


def kept_by_filter(student, teacher):
  """What `policy` says of a filter: a sum over two ids, less their mass."""
  ids = jnp.argsort(-jax.lax.stop_gradient(student))[:2]
  s, t = student[ids], teacher[ids]
  return jnp.sum(s * (jnp.log(s) - jnp.log(t) - 1))


def of_generator(f):
  """sum_v student_v f(teacher_v / student_v): the family's definition."""

  def quantity(student, teacher):
    return jnp.sum(student * f(teacher / student))

  return quantity


def with_tail(probabilities, ids):
  """The mass on some ids, and that on all others."""
  inside = probabilities[ids]
  return jnp.concatenate([inside, 1 - jnp.sum(inside, keepdims=True)])


def teacher_top_and_tail(student, teacher):
  ids = jnp.argsort(-teacher)[:1]
  return kl(with_tail(teacher, ids), with_tail(student, ids))


def teacher_two_renormalized(student, teacher):
  ids = jnp.argsort(-teacher)[:2]
  q = teacher[ids] / jnp.sum(teacher[ids])
  return jnp.sum(q * (jnp.log(q) - jnp.log(student[ids])))


def both_renormalized(student, teacher):
  ids = jnp.argsort(-jax.lax.stop_gradient(student))[:2]
  q, s = (x[ids] / jnp.sum(x[ids]) for x in (teacher, student))
  return kl(s, q)


def over_visited(quantity):
  return lambda world, student: world.visited(student, quantity)


def whole_sequence(world, student):
  """KL of whole completions, student || teacher."""
  return world.sequence(student, reverse_kl)


def forward_sequence(world, student):
  """KL of whole completions, teacher || student."""
  of_both = [jax.nn.log_softmax(x, axis=-1) for x in (world.teacher, student)]
  total = 0.0
  for completion in COMPLETIONS:
    teacher, ours = (
      sum(
        logprobs[ROW[completion[:step]], token]
        for step, token in enumerate(completion)
      )
      for logprobs in of_both
    )
    total += jnp.exp(teacher) * (teacher - ours)
  return total


def less_kl_to_behavior(world, student):
  """KL(student || teacher) - KL(student || behavior) at visited prefixes."""
  from_behavior = dataclasses.replace(world, teacher=world.behavior)
  return world.visited(student, reverse_kl) - from_behavior.visited(
    student, reverse_kl
  )


def k2_off_policy(world, student):
  """E_behavior[(s - t)^2] / 2 per visited prefix: no divergence."""
  reach = world.reach(world.behavior)
  total = 0.0
  for prefix, row in ROW.items():
    gap = jax.nn.log_softmax(student[row]) - jax.nn.log_softmax(
      world.teacher[row]
    )
    total += reach[prefix] * jnp.sum(softmax(world.behavior[row]) * gap**2) / 2
  return total


# A gate between the teacher's entropies: half of the prefixes are above it.
GATE = 0.9


def gated_forward_kl(student, teacher):
  entropy = -jnp.sum(teacher * jnp.log(teacher))
  forward = teacher_two_renormalized(student, teacher)
  return jnp.where(entropy > GATE, 0.5 * forward, 0.0)


def bounded(floor, dropped=False):
  """REOPOLD's divergence: linear where the log-ratio is below the floor."""
  slope = -(1 + floor if dropped else 1.0) / np.exp(floor)
  constant = 1.0 if dropped else 1.0 - floor

  def f(u):
    return jnp.where(u >= np.exp(floor), -jnp.log(u), constant + slope * u)

  return over_visited(of_generator(f))


def top_forward_kl(student, teacher):
  """Over the teacher's two likeliest ids, both models as they are."""
  ids = jnp.argsort(-teacher)[:2]
  return jnp.sum(teacher[ids] * (jnp.log(teacher) - jnp.log(student))[ids])


def asymmetric(student, teacher):
  """AOPD's: reverse KL's pull on tokens too unlikely, imitation elsewhere."""
  fixed = jax.lax.stop_gradient(student)
  pull = student * jnp.log(student / teacher) - student + teacher
  share = jnp.sum(jnp.where(teacher <= fixed, fixed, 0.0))
  return jnp.sum(
    jnp.where(fixed < teacher, pull, 0.0)
  ) + share * top_forward_kl(student, teacher)


def trusted(u):
  """TrOPD's generator inside the region."""
  return jnp.where(u <= 1, u * jnp.log(u) ** 2 / 2, u - 1 - jnp.log(u))


def trust_region(student, teacher):
  distance = jnp.sum(jnp.abs(jax.lax.stop_gradient(student) - teacher)) / 2
  return of_generator(trusted)(student, teacher) + distance * top_forward_kl(
    student, teacher
  )


def tilted(lam):
  """KL(student || target), the target tilted away from the reference."""

  def claim(world, student):
    teacher, reference = (
      jax.nn.log_softmax(logits, axis=-1)
      for logits in (world.teacher, world.reference)
    )
    target = lam * teacher + (1 - lam) * reference
    return dataclasses.replace(world, teacher=target).visited(
      student, reverse_kl
    )

  return claim


def inverse_length(world, student):
  """E_student[1 / length] of whole completions."""
  logprobs = jax.nn.log_softmax(student, axis=-1)
  total = 0.0
  for completion in COMPLETIONS:
    steps = [
      logprobs[ROW[completion[:step]], token]
      for step, token in enumerate(completion)
    ]
    total += jnp.exp(sum(steps)) / len(completion)
  return total


# No reward is bounded, and no ratio leaves this clip.
PLAIN = {
  "reward_scaling": 1.0,
  "length_norm": False,
  "whiten": False,
  "clip": 0.999,
}
# Of each completion, by a verifier that gives any score in [0, 1].
REWARDS = np.random.default_rng(11).uniform(size=len(COMPLETIONS))


def less_reward(scale):
  """-scale E_student[reward] of whole completions."""

  def claim(world, student):
    logprobs = jax.nn.log_softmax(student, axis=-1)
    total = 0.0
    for completion, reward in zip(COMPLETIONS, REWARDS, strict=True):
      steps = [
        logprobs[ROW[completion[:step]], token]
        for step, token in enumerate(completion)
      ]
      total -= scale * reward * jnp.exp(sum(steps))
    return total

  return claim


def kl_to_reference(world, student):
  other = dataclasses.replace(world, teacher=world.reference)
  return other.visited(student, reverse_kl)


# A mean over the rows of a group, whose own mean holds the row: (G - 1) / G.
GRPO = {"normalize_std": False}
PAIR = {"reduction": "seq_mean_token_sum", "rollouts": 2}

EOPD = {"entropy_threshold": GATE, "coefficient": 0.5, "top_k": 2}

# The coin's expectation; its two sides are enumerated in tropd_test.py.
EXPECTED = {"gate": "expected", "top_k": 2}

CASES: dict[str, tuple[Case, ...]] = {
  "aopd": (
    Case(over_visited(asymmetric), {"top_k": 2}),
    Case(over_visited(reverse_kl), {"tau": -1.0, "top_k": 2}, off_policy=True),
    Case(over_visited(forward_kl), {"tau": 1.0, "top_k": None}),
  ),
  "constant_negative_advantage": (
    # Divided by the row's length, it favours long rows; see also below.
    Case(inverse_length, reduction="token_mean"),
  ),
  "exopd": (
    Case(tilted(1.25)),
    Case(tilted(1.5), {"lam": 1.5}, off_policy=True),
  ),
  "gopd": (
    Case(over_visited(reverse_kl)),
    Case(tilted(0.4), {"lam": 0.4}),
    # At lam = 0 it is pulled to the reference alone.
    Case(tilted(0.0), {"lam": 0.0}, off_policy=True),
    Case(tilted(0.4), {"lam": 0.4}, off_policy=True, moved=True),
    Case(tilted(0.4), {"lam": 0.4, "max_weight": None}, moved=True),
    Case(tilted(0.4), {"lam": 0.4}, teacher_mix=0.2),
  ),
  "minillm": (
    # The reward of the token is in both parts.
    Case(
      lambda world, student: (
        whole_sequence(world, student) + world.visited(student, reverse_kl)
      ),
      {**PLAIN, "discount": 1.0},
    ),
    # Of the mixture's prefixes, the tokens weighed back to the student's.
    Case(
      lambda world, student: 2 * world.visited(student, reverse_kl),
      {**PLAIN, "discount": 0.0},
      teacher_mix=0.2,
    ),
    Case(
      less_kl_to_behavior,
      {**PLAIN, "discount": 0.0, "single_step": 0.0},
      off_policy=True,
      moved=True,
    ),
  ),
  "reopold": (
    Case(bounded(np.log(0.3) / 0.7, dropped=True), {"lam": 0.3}),
    Case(bounded(np.log(0.3) / 0.7), {"lam": 0.3, "switch": 0.0, "keep": 1.0}),
    Case(
      bounded(-0.5),
      {"variant": "clip_only", "floor_form": "fixed", "fixed_floor": -0.5},
      off_policy=True,
    ),
    Case(over_visited(reverse_kl), {"variant": "entropy_only", "keep": 1.0}),
  ),
  "tropd": (
    Case(over_visited(trust_region), EXPECTED),
    Case(over_visited(of_generator(trusted)), {**EXPECTED, "outlier": "mask"}),
    Case(
      lambda world, student: 0.4 * forward_sequence(world, student),
      {"guidance": 0.4, "top_k": 2},
      given=True,
    ),
    Case(
      bounded(-0.5),
      {"gate": "threshold", "outlier": "clip", "tau": -0.5},
      off_policy=True,
    ),
    Case(
      bounded(-0.5, dropped=True),
      {"gate": "threshold", "outlier": "mask", "tau": -0.5},
    ),
  ),
  "grpo": (
    Case(less_reward(1 / 2), GRPO, **PAIR),
    Case(
      lambda world, student: (
        less_reward(1 / 2)(world, student)
        + 0.7 * kl_to_reference(world, student)
      ),
      {**GRPO, "kl": 0.7},
      **PAIR,
    ),
  ),
  "opd_k1": (
    Case(over_visited(reverse_kl)),
    Case(over_visited(reverse_kl), off_policy=True),
    Case(less_kl_to_behavior, {"baseline": "behavior"}, off_policy=True),
    Case(whole_sequence, {"discount": 1.0}),
    Case(over_visited(reverse_kl), teacher_mix=0.2),
    Case(over_visited(kept_by_filter), filtered=True),
  ),
  "opd_k2": (
    Case(over_visited(reverse_kl)),
    Case(over_visited(reverse_kl), {"estimator": "k3+"}),
    Case(k2_off_policy, off_policy=True),
  ),
  "gkd": (
    Case(over_visited(reverse_kl)),
    Case(over_visited(forward_kl), {"beta": 0.0}),
    Case(over_visited(jsd(0.3)), {"beta": 0.3}, off_policy=True),
    Case(forward_sequence, {"beta": 0.0}, given=True),
    Case(over_visited(reverse_kl), given=True),
    Case(
      over_visited(of_generator(lambda u: (u - 1) * jnp.log(u))),
      {"divergence": "jeffreys"},
    ),
    Case(
      over_visited(of_generator(lambda u: jnp.abs(u - 1) / 2)),
      {"divergence": "total_variation"},
    ),
    Case(
      over_visited(of_generator(lambda u: (jnp.sqrt(u) - 1) ** 2 / 2)),
      {"divergence": "squared_hellinger"},
    ),
    Case(
      over_visited(of_generator(lambda u: (u - 1) ** 2)),
      {"divergence": "pearson_chi_square"},
    ),
    Case(
      over_visited(of_generator(lambda u: (1 - u) ** 2 / u)),
      {"divergence": "neyman_chi_square"},
    ),
    Case(
      over_visited(of_generator(lambda u: (u - 1) ** 2 / (u + 1))),
      {"divergence": "le_cam"},
    ),
    Case(
      over_visited(of_generator(lambda u: (u**1.5 - 1.5 * u + 0.5) / 0.75)),
      {"divergence": "alpha", "alpha": 1.5},
    ),
    Case(
      over_visited(teacher_top_and_tail),
      {"beta": 0.0, "support": "teacher_top_k", "top_k": 1},
    ),
    Case(
      over_visited(teacher_two_renormalized),
      {
        "divergence": "forward_kl",
        "support": "teacher_top_k",
        "top_k": 2,
        "normalization": "teacher_renormalized",
      },
    ),
    Case(
      over_visited(both_renormalized),
      {
        "support": "student_top_k",
        "top_k": 2,
        "normalization": "renormalized",
      },
    ),
  ),
  "distillm": (
    Case(over_visited(skewed(0.1, "forward"))),
    Case(over_visited(skewed(0.1, "forward")), given=True),
    Case(
      over_visited(skewed(0.4, "reverse")),
      {"divergence": "skew_reverse_kl", "alpha": 0.4},
    ),
  ),
  "eopd": (
    Case(
      over_visited(lambda s, t: reverse_kl(s, t) + gated_forward_kl(s, t)), EOPD
    ),
    Case(
      lambda world, student: (
        less_kl_to_behavior(world, student)
        + world.visited(student, gated_forward_kl)
      ),
      # No ratio leaves this clip; the default's 0.2 some do.
      {**EOPD, "clip": 0.99},
      off_policy=True,
      moved=True,
    ),
    Case(
      over_visited(lambda s, t: reverse_kl(s, t) + gated_forward_kl(s, t)),
      {**EOPD, "clip": 0.999},
      teacher_mix=0.2,
    ),
  ),
}


def make_world(off_policy, teacher_mix=0.0, given=False, filtered=False):
  """Student logits and the world around them; seeds chosen once."""
  rng = np.random.default_rng(4)
  shape = (len(PREFIXES), VOCAB)
  student, teacher, reference, shift = (rng.normal(size=shape) for _ in "strb")
  behavior = student + 0.2 * shift if off_policy else student
  if teacher_mix:
    mixture = teacher_mix * softmax(teacher)
    behavior = jnp.log(mixture + (1 - teacher_mix) * softmax(behavior))
  if filtered:
    least = jnp.min(behavior, axis=-1, keepdims=True)
    behavior = jnp.where(behavior > least, behavior, -jnp.inf)
  return jnp.asarray(student), World(
    jnp.asarray(teacher),
    jnp.asarray(reference),
    jnp.asarray(teacher if given else behavior),
    given,
  )


def expected_gradient(objective, student, world, moved=False, rollouts=1):
  """sum_y p_behavior(y) grad loss(y) in the student's table.

  y runs over groups of `rollouts` completions of the prompt. With `moved` the
  behavior is the student before the first update.
  """
  rows = np.zeros((len(COMPLETIONS), LENGTH), np.int32)
  tokens = np.zeros_like(rows)
  mask = np.zeros(rows.shape, bool)
  for index, completion in enumerate(COMPLETIONS):
    for step, token in enumerate(completion):
      rows[index, step] = ROW[completion[:step]]
      tokens[index, step] = token
      mask[index, step] = True
  behavior = support.token_logprobs(world.behavior[rows], tokens)
  behavior = jnp.where(mask, behavior, 0.0)
  chance = jnp.exp(jnp.sum(behavior, axis=1))
  np.testing.assert_allclose(jnp.sum(chance), 1.0, atol=1e-12)
  if world.given:
    behavior = jnp.zeros_like(behavior)
  # Of completions with chance 0: any finite value.
  behavior = jnp.where(jnp.isfinite(behavior), behavior, 0.0)

  groups = jnp.asarray(
    list(itertools.product(range(len(COMPLETIONS)), repeat=rollouts))
  )

  def gradient(rows, tokens, mask, behavior, rewards):
    def loss(table):
      logits = {
        role: table_of[rows]
        for role, table_of in (
          ("student", table),
          ("teacher", world.teacher),
          ("reference", world.reference),
        )
      }
      logits["student_privileged"] = logits["student"]
      return support.loss_of(
        objective,
        logits,
        tokens,
        mask,
        behavior,
        start=behavior if moved else None,
        given=world.given,
        group=jnp.zeros(rollouts, jnp.int32),
        rewards=rewards,
      )[0]

    return jax.grad(loss)(student)

  by_completion = (rows, tokens, mask, behavior, REWARDS)
  gradients = jax.jit(jax.vmap(gradient))(
    *(jnp.asarray(leaf)[groups] for leaf in by_completion)
  )
  return jnp.tensordot(jnp.prod(chance[groups], axis=1), gradients, axes=1)


def all_cases():
  for name, cases in CASES.items():
    for case in cases:
      words = [f"{key}={value}" for key, value in case.options.items()]
      words += ["off_policy"] if case.off_policy else []
      words += ["moved"] if case.moved else []
      words += [f"teacher_mix={case.teacher_mix}"] if case.teacher_mix else []
      words += ["filtered"] if case.filtered else []
      words += ["given"] if case.given else []
      yield pytest.param(name, case, id="-".join([name, *words]))


def test_every_objective_says_what_it_descends():
  missing = set(objectives.OBJECTIVES) - set(CASES)
  assert not missing, f"add cases for {sorted(missing)}"


@pytest.mark.parametrize(("name", "case"), list(all_cases()))
def test_expected_gradient_is_that_of_the_claim(name, case):
  with jax.enable_x64(True):
    student, world = make_world(
      case.off_policy, case.teacher_mix, case.given, case.filtered
    )
    found = expected_gradient(
      case.create(name), student, world, case.moved, case.rollouts
    )
    claimed = jax.grad(lambda table: case.claim(world, table))(student)
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, claimed, rtol=0, atol=TOLERANCE)
    assert jnp.max(jnp.abs(claimed)) > 1e-2


def _gradients(name, claim, off_policy=False):
  """The expected gradient of an objective's defaults, and that of a claim."""
  with jax.enable_x64(True):
    student, world = make_world(off_policy)
    found = expected_gradient(Case(claim).create(name), student, world)
    exact = jax.grad(lambda table: claim(world, table))(student)
    return np.asarray(found), np.asarray(exact)


@pytest.mark.parametrize("name", ["opd_k1", "opd_k2", "gkd"])
def test_bias_of_leaving_out_later_prefixes(name):
  """Less than the gradient of the whole completions' KL, by a known part.

  What is missing is the gradient through the probabilities of the prefixes,
  the divergences at them fixed: exactly this, and with a minus.
  """

  def through_prefixes(world, student):
    return world.sequence(
      student, lambda s, t: jax.lax.stop_gradient(reverse_kl(s, t))
    )

  found, whole = _gradients(name, whole_sequence)
  _, missing = _gradients(name, through_prefixes)
  np.testing.assert_allclose(found - whole, -missing, rtol=0, atol=TOLERANCE)
  assert np.max(np.abs(missing)) > 0.01
  # Biased, but a direction of descent all the same.
  assert np.sum(found * whole) > 0


def test_a_constant_advantage_expects_nothing():
  """In the sum over tokens, on policy: what the control is for."""
  with jax.enable_x64(True):
    student, world = make_world(off_policy=False)
    objective = Case(inverse_length).create("constant_negative_advantage")
    found = expected_gradient(objective, student, world)
    np.testing.assert_allclose(found, jnp.zeros_like(found), atol=TOLERANCE)


def test_bias_of_k2_off_policy():
  """On tokens of another behavior k2 is not the reverse KL there; k1 is."""
  claim = over_visited(reverse_kl)
  by_k1, exact = _gradients("opd_k1", claim, off_policy=True)
  by_k2, _ = _gradients("opd_k2", claim, off_policy=True)
  np.testing.assert_allclose(by_k1, exact, rtol=0, atol=TOLERANCE)
  assert np.max(np.abs(by_k2 - exact)) > 0.01


@pytest.mark.parametrize("name", ["opd_k1", "opd_k2", "gkd"])
def test_a_wrong_claim_is_found_out(name):
  """The direction turned round."""
  found, wrong = _gradients(name, over_visited(forward_kl))
  assert np.max(np.abs(found - wrong)) > 0.05


@pytest.mark.parametrize(
  ("name", "index", "neighbour"),
  [
    ("reopold", 0, bounded(np.log(0.3) / 0.7)),
    ("reopold", 1, bounded(np.log(0.3) / 0.7, dropped=True)),
    ("reopold", 2, over_visited(reverse_kl)),
    ("exopd", 0, over_visited(reverse_kl)),
    ("gopd", 1, tilted(0.6)),
    ("opd_k1", 5, over_visited(reverse_kl)),
    ("aopd", 0, over_visited(reverse_kl)),
    ("grpo", 0, less_reward(1.0)),
    ("tropd", 0, over_visited(of_generator(trusted))),
    ("tropd", 1, over_visited(reverse_kl)),
    ("minillm", 0, whole_sequence),
    ("minillm", 2, over_visited(reverse_kl)),
    (
      "eopd",
      1,
      over_visited(lambda s, t: reverse_kl(s, t) + gated_forward_kl(s, t)),
    ),
  ],
)
def test_neighbouring_claims_are_told_apart(name, index, neighbour):
  """What a case does not descend, though another one does."""
  case = CASES[name][index]
  with jax.enable_x64(True):
    student, world = make_world(
      case.off_policy, case.teacher_mix, filtered=case.filtered
    )
    found = expected_gradient(
      case.create(name), student, world, case.moved, case.rollouts
    )
    wrong = jax.grad(lambda table: neighbour(world, table))(student)
    assert jnp.max(jnp.abs(found - wrong)) > 1e-3


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_what_the_refused_losses_would_descend(estimator):
  """k1 as a loss: nothing. k3 as a loss: KL(teacher || student)."""

  def terms(config, scores, signals):
    estimate = getattr(estimators, estimator)
    loss = estimate(scores.student.logprobs, scores.teacher.logprobs)
    return {"loss": base.Term(loss, "sum")}, {}

  module = types.SimpleNamespace(
    needs=lambda config: base.Needs(
      student=base.Request(logprobs=True), teacher=base.Request(logprobs=True)
    ),
    terms=terms,
  )
  with jax.enable_x64(True):
    student, world = make_world(off_policy=False)
    objective = base.Objective.bind(estimator, module, None)
    found = expected_gradient(objective, student, world)
    forward = jax.grad(lambda table: world.visited(table, forward_kl))(student)
    claimed = forward if estimator == "k3" else jnp.zeros_like(forward)
    np.testing.assert_allclose(found, claimed, rtol=0, atol=TOLERANCE)
