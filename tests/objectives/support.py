"""Scores made from logits, and objectives evaluated on them directly.

The engine's own path (micro-batches, chunks, trunk and head) is not used here,
so that it can be compared with this one.
"""

import dataclasses

import jax
import jax.numpy as jnp

from opd_jax.objectives import base, divergences, reduce
from opd_jax.types import ModelScores, Scores

# The fixture of the objective specifications: B = 2, T = 3, V = 4; the last
# token of row 1 is padding.
STUDENT_LOGITS = jnp.array(
  [
    [[1.0, 0.5, -0.5, 0.0], [0.2, -0.3, 1.5, 0.1], [0.0, 2.0, -1.0, 0.5]],
    [[0.3, 0.3, 0.3, 0.3], [-1.0, 0.0, 1.0, 2.0], [0.7, -0.2, 0.4, -1.1]],
  ],
  jnp.float32,
)
TEACHER_LOGITS = jnp.array(
  [
    [[2.0, 0.0, -1.0, 0.5], [-0.5, 0.5, 2.5, 0.0], [1.5, -2.0, 0.5, 0.0]],
    [[0.1, 0.9, -0.4, 0.6], [-0.5, 0.6, 0.4, 1.5], [0.1, 0.0, -0.1, 0.2]],
  ],
  jnp.float32,
)
TOKENS = jnp.array([[0, 2, 1], [3, 3, 0]], jnp.int32)
MASK = jnp.array([[1, 1, 1], [1, 1, 0]], bool)
BEHAVIOR_SHIFT = jnp.array(
  [[0.05, -0.10, 0.20], [0.0, -0.30, 0.0]], jnp.float32
)
# On policy: the behavior is the student.
NO_SHIFT = jnp.zeros((2, 3), jnp.float32)
REFERENCE_LOGITS = jnp.array(
  [
    [[0.8, 0.6, -0.4, 0.1], [0.1, -0.2, 1.2, 0.2], [0.1, 1.0, -0.5, 0.4]],
    [[0.2, 0.4, 0.2, 0.4], [-0.8, 0.2, 0.9, 1.2], [0.5, 0.0, 0.3, -0.8]],
  ],
  jnp.float32,
)


def token_logprobs(logits, tokens):
  logprobs = jax.nn.log_softmax(logits, axis=-1)
  return jnp.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0]


def model_scores(logits, tokens, mask, request):
  """What scoring gives: masked slots hold 0."""
  logprobs = jax.nn.log_softmax(
    jnp.where(mask[..., None], logits, jnp.zeros((), logits.dtype)), axis=-1
  )
  entropy = divergences.entropy(
    logprobs if request.entropy_gradient else jax.lax.stop_gradient(logprobs)
  )
  drawn = jnp.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0]
  zero = jnp.zeros((), drawn.dtype)
  return ModelScores(
    logprobs=jnp.where(mask, drawn, zero) if request.logprobs else None,
    entropy=jnp.where(mask, entropy, zero) if request.entropy else None,
    vocab_logprobs=logprobs if request.vocab_logprobs else None,
  )


def scores_of(
  needs,
  logits,
  tokens,
  mask,
  behavior_logprobs,
  *,
  start=None,
  given=False,
  group=None,
  rewards=None,
):
  """Scores from a dict of logits by role.

  `start` are the student's log-probabilities before the first of several
  updates; None where this is the first. `given` says which tokens are not
  drawn: all, none, or a mask [B, T]. Without `group` and `rewards` every row is
  a group of its own, and right.
  """
  if start is None:
    needs = needs.starting_here()
  empty = ModelScores()
  if needs.start and start is None:
    student = model_scores(logits["student"], tokens, mask, needs.student)
    start = jax.lax.stop_gradient(student.logprobs)
  rows = tokens.shape[0]
  if group is None:
    group = jnp.arange(rows, dtype=jnp.int32)
  if rewards is None:
    rewards = jnp.ones(rows, jnp.float32)
  drawn = mask & ~jnp.asarray(given)
  return Scores(
    tokens=tokens,
    sampled_mask=drawn,
    loss_mask=mask,
    behavior_valid=drawn,
    behavior_logprobs=behavior_logprobs,
    group=group,
    rewards=rewards if needs.rewards else None,
    start_logprobs=start if needs.start else None,
    **{
      role: model_scores(logits[role], tokens, mask, getattr(needs, role))
      if getattr(needs, role)
      else empty
      for role in base.ROLES
    },
  )


def schedule(step):
  """A step of ten."""
  return base.Schedule(
    step=jnp.asarray(step, jnp.int32),
    progress=jnp.asarray(step, jnp.float32) / 10.0,
    key=jax.random.key(step),
  )


def loss_of(
  objective,
  logits,
  tokens,
  mask,
  behavior_logprobs,
  state=None,
  step=0,
  at=None,
  **rows,
):
  """The reduced loss of a whole batch, and the terms by name.

  `at` is a whole schedule, in place of that of `step`; `rows` as in
  `scores_of`.
  """
  needs = dataclasses.replace(
    objective.prepare_needs, rewards=objective.needs.rewards
  )
  batch = (logits, tokens, mask, behavior_logprobs)
  before = scores_of(needs, *batch, **rows)
  signals = objective.prepare(
    before,
    objective.init_state() if state is None else state,
    schedule(step) if at is None else at,
  )
  scores = scores_of(objective.needs, *batch, **rows)
  terms, _ = objective.terms(scores, signals)
  counts = reduce.Counts.of(jnp.asarray(mask))
  losses = {
    name: reduce.partial_sum(term, mask, counts, signals)
    for name, term in terms.items()
  }
  return sum(losses.values()), losses


def fixture_loss(
  objective,
  student=STUDENT_LOGITS,
  shift=BEHAVIOR_SHIFT,
  step=0,
  drew=False,
  **others,
):
  """The loss on the fixture as a function of the student's logits.

  `drew` says that the behavior is the student before the first of several
  updates; `others` are logits of roles that are not the teacher's.
  """
  behavior = token_logprobs(STUDENT_LOGITS, TOKENS) + shift
  logits = {**dict.fromkeys(base.ROLES, TEACHER_LOGITS), **others}
  return loss_of(
    objective,
    {**logits, "student": student},
    TOKENS,
    MASK,
    behavior,
    step=step,
    start=behavior if drew else None,
  )[0]
