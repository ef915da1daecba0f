"""Claims of papers, what would show them here, and whether it was seen.

Written before the runs were looked at. Every comparison is of two entries at
the same seeds, so that data order and uniforms are the same; its interval is
over runs and problems for an accuracy (`estimates.crossed`), and over runs for
a curve's mean (`estimates.over_runs`). Claims are about shape, at the scale of
the quickstart: 0.16M parameters, 100 steps, an all but deterministic teacher.

A claim of "more" or "less" is seen if the interval excludes 0 on that side,
and contradicted if it excludes 0 on the other. "At least as good" is seen if
the interval lies above -MARGIN, contradicted if it lies below it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from benchmarks.study.runs import SAMPLES
from opd_jax import estimates
from opd_jax.estimates import Interval

# Of accuracies: what "no worse" means.
MARGIN = 0.02

Record = Mapping[str, Any]
Verdict = Literal["seen", "not seen", "contradicted"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
  """One quantity of two entries, the second less the first.

  Attributes:
    first: entry.
    second: entry.
    expected: of the difference.
    quantity: name of a curve, whose mean over the run counts; or None for the
      accuracy after it.
    problems: name of an evaluation.
  """

  first: str
  second: str
  expected: Literal["more", "less", "at least as good"]
  quantity: str | None = None
  problems: str = "test"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
  """What a paper says, and how it is looked at.

  Attributes:
    title: in a few words.
    source: of it.
    design: the runs, and what they should show.
    comparisons: that are to be seen for the claim to hold here.
  """

  title: str
  source: str
  design: str
  comparisons: Sequence[Comparison]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
  """A comparison's figures.

  Attributes:
    first: mean over the runs.
    second: likewise.
    difference: second less first.
    interval: 95 % of it.
    seeds: that both entries were run with.
    verdict: on what was expected.
  """

  first: float
  second: float
  difference: float
  interval: Interval
  seeds: Sequence[int]
  verdict: Verdict


def compare(
  comparison: Comparison, records: Sequence[Record]
) -> Finding | None:
  """The finding on the seeds that both entries have; None below two.

  A first entry of a single run is a model that every second one is compared
  with, such as a teacher.
  """
  before, after = (
    {r["seed"]: r for r in records if r["entry"] == name}
    for name in (comparison.first, comparison.second)
  )
  if len(before) == 1:
    before = dict.fromkeys(after, *before.values())
  seeds = sorted(before.keys() & after.keys())
  if len(seeds) < 2:
    return None
  first, second = (
    np.array([_values(comparison, by_seed[seed]) for seed in seeds])
    for by_seed in (before, after)
  )
  if comparison.quantity is None:
    mean, interval = estimates.crossed(second - first, SAMPLES)
  else:
    mean, interval = estimates.over_runs(second - first)
  return Finding(
    first=float(np.mean(first)),
    second=float(np.mean(second)),
    difference=mean,
    interval=interval,
    seeds=seeds,
    verdict=_verdict(comparison.expected, interval),
  )


def _values(comparison: Comparison, record: Record) -> Any:
  """A run's accuracies by problem, or the mean of its curve."""
  if comparison.quantity is None:
    return accuracies(record, comparison.problems)
  return np.mean(record["curves"][comparison.quantity])


def accuracies(record: Record, problems: str) -> np.ndarray:
  """Of a run, by problem."""
  return np.array(record["right"][problems]) / SAMPLES


def _verdict(expected: str, interval: Interval) -> Verdict:
  low, high = interval
  if expected == "less":
    low, high = -high, -low
  bound = -MARGIN if expected == "at least as good" else 0.0
  if low > bound:
    return "seen"
  return "contradicted" if high < bound else "not seen"


CLAIMS = (
  Claim(
    title="REOPOLD's bounded reward tames the gradient and keeps entropy",
    source="arXiv 2603.11137; arXiv 2606.01249 for the bounded reward alone",
    design="reopold_clip is opd_k1 with rewards bounded at -2.56 nats "
    '(variant="clip_only"), every token kept. Means over the 100 steps of the '
    "gradient norm before clipping and of the student's entropy. On sums both "
    "entropies fall towards the teacher's, which is near 0, so that the faster "
    "learner has the lower one. So the same again on TinyStories, 60 steps, "
    "where the teacher is unsure; this was added after the first runs on sums.",
    comparisons=(
      Comparison(
        first="opd_k1",
        second="reopold_clip",
        quantity="grad_norm",
        expected="less",
      ),
      Comparison(
        first="opd_k1",
        second="reopold_clip",
        quantity="entropy",
        expected="more",
      ),
      Comparison(
        first="stories_opd_k1",
        second="stories_reopold_clip",
        quantity="grad_norm",
        expected="less",
      ),
      Comparison(
        first="stories_opd_k1",
        second="stories_reopold_clip",
        quantity="entropy",
        expected="more",
      ),
    ),
  ),
  Claim(
    title="Reward extrapolation ends above plain distillation",
    source="arXiv 2602.12125, single teacher",
    design="The teacher is the student itself after 20 steps of gkd, so that "
    "teacher and reference are of one kind and there is headroom. The student "
    "starts anew from the reference and learns from it by gopd with lam 1 and "
    "1.25, and 1.5 for the trend. Added after the first runs: the same with a "
    "teacher that was tuned by grpo, as the paper's was.",
    comparisons=(
      Comparison(
        first="tuned_gopd_1", second="tuned_gopd_1.25", expected="more"
      ),
      Comparison(
        first="tuned_gopd_1", second="tuned_gopd_1.5", expected="more"
      ),
      Comparison(first="tuned", second="tuned_gopd_1.25", expected="more"),
      Comparison(
        first="rewarded_gopd_1", second="rewarded_gopd_1.25", expected="more"
      ),
      Comparison(
        first="rewarded_gopd_1", second="rewarded_gopd_1.5", expected="more"
      ),
      Comparison(
        first="rewarded", second="rewarded_gopd_1.25", expected="more"
      ),
    ),
  ),
  Claim(
    title="TrOPD is no worse than opd_k1, with smaller gradients",
    source="arXiv 2606.01249, without prefixes",
    design="tropd with the Bernoulli gate and forward KL on the teacher's 4 "
    "likeliest of 20 ids outside of it. Accuracy after the run, and the mean "
    "over the 100 steps of the gradient norm before clipping.",
    comparisons=(
      Comparison(first="opd_k1", second="tropd", expected="at least as good"),
      Comparison(
        first="opd_k1",
        second="tropd",
        quantity="grad_norm",
        expected="less",
      ),
    ),
  ),
  Claim(
    title="A student of two domain teachers beats each on its own domain",
    source="arXiv 2602.12125, multiple teachers, lam 1.25",
    design="Two copies of the student, tuned by 100 steps of grpo, one on "
    "problems of level 3, one on problems of level 5. The student learns from "
    "both, each scoring the rows of its level, by gopd with lam 1.25 and 1. "
    "Held-out problems of both levels. Planned with teachers that gkd had "
    "tuned for 20 steps; changed before any merge was run, since going beyond "
    "such a teacher had turned out to lead nowhere.",
    comparisons=(
      Comparison(
        first="rewarded_short",
        second="merged_1.25",
        problems="short",
        expected="more",
      ),
      Comparison(
        first="rewarded_long",
        second="merged_1.25",
        problems="long",
        expected="more",
      ),
      Comparison(
        first="merged_1",
        second="merged_1.25",
        problems="short",
        expected="more",
      ),
      Comparison(
        first="merged_1",
        second="merged_1.25",
        problems="long",
        expected="more",
      ),
    ),
  ),
  Claim(
    title="Half of the tokens, chosen by Soft-OR, are as good as all",
    source="arXiv 2604.14084; for memory see benchmarks/selection.py, since "
    "with 20 ids no memory is in the heads",
    design="gkd with beta 1 on all tokens, and on the half of each rollout's "
    "tokens with the highest Soft-OR score.",
    comparisons=(
      Comparison(first="gkd", second="tip", expected="at least as good"),
    ),
  ),
)
