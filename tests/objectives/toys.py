"""Objectives that use every part of the contract; no method of the field.

Each is a namespace with the functions an objective module has.
"""

import types

import jax
import jax.numpy as jnp

from opd_jax.objectives import divergences
from opd_jax.objectives.base import Needs, Objective, Request, Signals, Term

_LOGPROBS = Request(logprobs=True)
_VOCAB = Request(vocab_logprobs=True)


def _toy(**functions):
  return types.SimpleNamespace(**functions)


def _quantile_prepare(config, scores, state, schedule):
  entropy = jnp.where(scores.loss_mask, scores.student.entropy, jnp.nan)
  bound = jnp.nanquantile(entropy, 0.6)
  selected = (scores.student.entropy >= bound) & scores.loss_mask
  weight = selected.astype(jnp.float32)
  return Signals(
    token={"selected": weight}, normalizer={"selected": jnp.sum(weight)}
  )


def _quantile_terms(config, scores, signals):
  loss = divergences.kl(
    scores.student.vocab_logprobs, scores.teacher.vocab_logprobs
  )
  weight = signals.token["selected"]
  term = Term(weight * loss, "selection_mean", "selected")
  return {"selected": term}, {"share": Term(weight)}


# Normalises by the size of a selection that a batch quantile makes.
quantile = _toy(
  needs=lambda config: Needs(student=_VOCAB, teacher=_VOCAB),
  prepare_needs=lambda config: Needs(student=Request(entropy=True)),
  prepare=_quantile_prepare,
  terms=_quantile_terms,
)


def _three_prepare(config, scores, state, schedule):
  gap = scores.teacher.logprobs - scores.behavior_logprobs
  better = ((gap > 0) & scores.loss_mask).astype(jnp.float32)
  return Signals(
    token={"better": better},
    row={"gap": jnp.sum(jnp.where(scores.loss_mask, gap, 0.0), axis=1)},
    normalizer={"better": jnp.sum(better)},
  )


def _three_terms(config, scores, signals):
  gap = jax.lax.stop_gradient(scores.teacher.logprobs - scores.student.logprobs)
  return {
    "policy": Term(-scores.student.logprobs * gap, "token_mean"),
    "entropy": Term(-0.1 * scores.student.entropy, "seq_mean_token_mean"),
    "better": Term(
      -signals.token["better"]
      * jnp.tanh(signals.row["gap"])[:, None]
      * scores.student.logprobs,
      "selection_mean",
      "better",
    ),
  }, {}


# Three terms with three normalisers; an entropy with gradient.
three_terms = _toy(
  needs=lambda config: Needs(
    student=Request(logprobs=True, entropy=True, entropy_gradient=True),
    teacher=_LOGPROBS,
  ),
  prepare_needs=lambda config: Needs(teacher=_LOGPROBS),
  prepare=_three_prepare,
  terms=_three_terms,
)


# A dual variable that follows the entropy from step to step.
stateful = _toy(
  needs=lambda config: Needs(
    student=Request(logprobs=True, entropy=True), teacher=_LOGPROBS
  ),
  init_state=lambda config: {"mean_entropy": jnp.asarray(1.0, jnp.float32)},
  prepare=lambda config, scores, state, schedule: Signals(
    scalar={"mean_entropy": state["mean_entropy"], "now": schedule.progress}
  ),
  terms=lambda config, scores, signals: (
    {
      "policy": Term(
        scores.student.logprobs
        * jax.lax.stop_gradient(
          scores.student.logprobs - scores.teacher.logprobs
        )
        * (signals.scalar["mean_entropy"] + signals.scalar["now"])
      )
    },
    {"entropy": Term(scores.student.entropy)},
  ),
  update_state=lambda config, state, statistics: {
    "mean_entropy": 0.5 * (state["mean_entropy"] + statistics["entropy"])
  },
)


# Gradient through the student after two different prompts.
two_prompts = _toy(
  needs=lambda config: Needs(
    student=_VOCAB,
    student_privileged=Request(logprobs=True, vocab_logprobs=True),
    teacher=_LOGPROBS,
  ),
  terms=lambda config, scores, signals: (
    {
      "agree": Term(
        divergences.kl(
          scores.student.vocab_logprobs,
          scores.student_privileged.vocab_logprobs,
        )
      ),
      "privileged": Term(
        scores.student_privileged.logprobs
        * jax.lax.stop_gradient(
          scores.student_privileged.logprobs - scores.teacher.logprobs
        ),
        "seq_mean_token_mean",
      ),
    },
    {},
  ),
)


def _rows_terms(config, scores, signals):
  total = jnp.sum(scores.student.logprobs, axis=1)
  gain = jnp.sum(scores.teacher.logprobs, axis=1) - total
  return {
    "row": Term(jnp.exp(-0.01 * total**2) * gain, "row_mean"),
    "token": Term(-0.1 * scores.student.entropy, "token_mean"),
  }, {}


# A loss of whole rows, which is not a sum over tokens.
whole_rows = _toy(
  needs=lambda config: Needs(
    student=Request(logprobs=True, entropy=True, entropy_gradient=True),
    teacher=_LOGPROBS,
    whole_rows=True,
  ),
  terms=_rows_terms,
)


TOYS = {
  "quantile": quantile,
  "three_terms": three_terms,
  "stateful": stateful,
  "two_prompts": two_prompts,
  "whole_rows": whole_rows,
}


def bind(name):
  return Objective.bind(name, TOYS[name], None)
