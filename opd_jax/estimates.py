"""What sampled answers say of a model, and how sure that is.

Every estimate is a mean over problems of a number in [0, 1] per problem. The
problems are the independent draws, their samples are not: a hard problem stays
hard. So an interval is about the model on problems of this kind, and more
samples narrow it only as far as the problems agree.
"""

import functools
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import stdtrit


class Interval(NamedTuple):
  """A 95 % confidence interval."""

  low: float
  high: float


def pass_at(right: Bool[np.ndarray, "N n"], k: int) -> Float[np.ndarray, " N"]:
  """The chance that one of k samples is right, per problem; unbiased.

  1 - C(n - c, k) / C(n, k), c of n samples being right: equation 1 of
  arXiv:2107.03374. For k = n it is 1 or 0.

  Args:
    right: of n samples of N problems.
    k: in [1, n].
  """
  n = _check(right.shape[1], k)
  table = [1 - math.comb(n - c, k) / math.comb(n, k) for c in range(n + 1)]
  return np.array(table)[right.sum(axis=1)]


def majority_at(
  votes: Sequence[Sequence[Hashable]], right: Bool[np.ndarray, "N n"], k: int
) -> Float[np.ndarray, " N"]:
  """The chance that the majority of k samples is right, per problem; exact.

  The mean over all subsets of k of the n samples. The answer given most often
  wins; of answers given equally often each wins with the same chance. Samples
  without an answer do not vote; without any vote the majority is wrong.

  Args:
    votes: the answer of every sample, None for none.
    right: of n samples of N problems. Where samples of one answer differ, their
      mean counts.
    k: in [1, n].
  """
  n = _check(right.shape[1], k)
  result = np.zeros(len(votes))
  for problem, (row, marks) in enumerate(zip(votes, right, strict=True)):
    counts = Counter(vote for vote in row if vote is not None)
    correct = Counter()
    for vote, mark in zip(row, marks, strict=True):
      correct[vote] += int(mark)
    sizes = tuple(sorted(counts.values()))
    wins = _wins(sizes, n - sum(sizes), k)
    result[problem] = sum(
      wins[size] * correct[vote] / size for vote, size in counts.items()
    )
  return result


def _check(n: int, k: int) -> int:
  if not 1 <= k <= n:
    raise ValueError(f"k must be in [1, {n}], the samples, got {k}")
  return n


@functools.lru_cache(maxsize=100_000)
def _wins(sizes: tuple[int, ...], silent: int, k: int) -> dict[int, float]:
  """The chance to win of an answer that `size` samples gave, by size.

  Args:
    sizes: how many samples gave each answer.
    silent: samples without one.
    k: size of the subsets.
  """
  total = math.comb(sum(sizes) + silent, k)
  wins = {}
  for size in set(sizes):
    others = list(sizes)
    others.remove(size)
    chance = 0.0
    for most in range(1, min(size, k) + 1):
      # ways[s, t]: to draw s samples of the others, `most` of each of t
      # answers and fewer of the rest.
      ways = np.zeros((k + 1, len(others) + 1))
      ways[: silent + 1, 0] = [math.comb(silent, s) for s in range(k + 1)][
        : silent + 1
      ]
      for other in others:
        ways = _draw(ways, other, most)
      ties = 1 + np.arange(len(others) + 1)
      chance += math.comb(size, most) * float(np.sum(ways[k - most] / ties))
    wins[size] = chance / total
  return wins


def _draw(
  ways: Float[np.ndarray, "s t"], size: int, most: int
) -> Float[np.ndarray, "s t"]:
  """`ways` with one more answer, given by `size` samples."""
  result = ways.copy()
  for drawn in range(1, min(size, most, len(ways) - 1) + 1):
    more = math.comb(size, drawn) * ways[:-drawn]
    if drawn < most:
      result[drawn:] += more
    else:
      result[drawn:, 1:] += more[:, :-1]
  return result


def interval(values: Float[np.ndarray, " N"], samples: float) -> Interval:
  """95 % for the mean over all problems of this kind; never of width 0.

  Wilson's interval for n independent answers, n being how many of them would
  leave the variance that the mean over the problems has: about N / r, where
  r = s^2 / (p (1 - p)), s^2 the variance between the problems' values. It is N
  where the samples of every problem agree (then this is Wilson's interval for N
  answers), and N x samples where problems do not matter. The quantile is
  Student's in so far as r is estimated, with (N - 1) / (1 - r) degrees of
  freedom.

  Where m problems only are not all right (or not all wrong), r is hardly known:
  it is taken as (m^2 r + 1) / (m^2 + 1), which goes to 1, the worst, with m.

  In simulations (`tests/estimates_test.py`) the interval of a mean over samples
  (avg@k) covers at 95 +- 1.5 % from 30 problems on, if n p and n (1 - p) are at
  least 9, and at 92 to 98 % with fewer right (or wrong) answers than that. For
  pass@k and maj@k n / k is the least that the samples can be worth, since the
  subsets of k overlap: these are covered at 94 to 99 %, most where problems
  hardly differ, so their intervals are rather too wide.

  Args:
    values: per problem, in [0, 1].
    samples: independent ones that a value is made of; n / k, at least, for
      pass@k and maj@k.

  Returns:
    Its ends. (0, 1) for a single problem, which says nothing of others.
  """
  count = len(values)
  if count == 1:
    return Interval(0.0, 1.0)
  mean = float(np.mean(values))
  spread = mean * (1 - mean)
  ratio = float(np.var(values)) / spread if spread > 0 else 1.0
  mixed = int(min(np.sum(values > 0), np.sum(values < 1)))
  ratio = min((mixed**2 * ratio + 1) / (mixed**2 + 1), 1.0)
  effective = min((count - (1 - ratio)) / ratio, count * samples)
  freedom = (count - 1) / max(1 - ratio, 1e-9)
  squared = float(stdtrit(freedom, 0.975)) ** 2 / effective
  center = (mean + squared / 2) / (1 + squared)
  half = math.sqrt(squared * (spread + squared / 4)) / (1 + squared)
  return Interval(max(center - half, 0.0), min(center + half, 1.0))


def difference(
  before: Float[np.ndarray, " N"], after: Float[np.ndarray, " N"], samples: int
) -> tuple[float, Interval]:
  """The mean of after - before on the same problems, and 95 % for it.

  Student's interval over the problems' differences. So that it is never of
  width 0, one problem is added whose difference is 1 / samples in either
  direction, half of it each; for many problems that is nothing.

  Args:
    before: per problem, in [0, 1].
    after: on the same problems in the same order.
    samples: per problem.

  Returns:
    The mean, and the ends. (-1, 1) for a single problem.
  """
  differences = np.asarray(after, float) - np.asarray(before, float)
  mean = float(np.mean(differences))
  count = len(differences)
  if count == 1:
    return mean, Interval(-1.0, 1.0)
  squares = float(np.sum((differences - mean) ** 2)) + 1 / samples**2
  half = float(stdtrit(count, 0.975)) * math.sqrt(squares / count / (count + 1))
  return mean, Interval(max(mean - half, -1.0), min(mean + half, 1.0))


def crossed(
  values: Float[np.ndarray, "S N"], samples: int
) -> tuple[float, Interval]:
  """The mean over runs and problems, and 95 % for it; both are draws.

  For what is said of a way to train, not of one model. Runs that differ in
  their seed meet the same problems, and the variance of the mean is that of
  two crossed random effects,

    max(M_S + M_N - M_R, M_S, M_N) / (S N)

  with the mean squares of runs, problems and the rest, Student's quantile, and
  the degrees of freedom that Satterthwaite gives to the sum. A few runs say
  little of how runs differ: with S = 3 the interval is up to twice as wide as
  the problems alone would make it. As in `difference` one problem is added, so
  that it is never of width 0.

  In simulations (`tests/estimates_test.py`) it covers at 94 to 98 %, most
  where runs do not differ at all; the interval over the problems alone covers
  at 44 % where they differ by 3 points.

  Args:
    values: of a run on a problem: an accuracy in [0, 1], or the difference of
      two runs of one seed on it, in [-1, 1].
    samples: that a value is a mean of.

  Returns:
    The mean, and the ends, in [-1, 1]; those of `difference` for one run.
  """
  runs, count = values.shape
  if runs == 1:
    return difference(np.zeros(count), values[0], samples)
  mean = float(np.mean(values))
  of_runs = values.mean(axis=1) - mean
  of_problems = values.mean(axis=0) - mean
  rest = values - mean - of_runs[:, None] - of_problems
  extra = 1 / (samples * runs) ** 2
  run_square = count * float(of_runs @ of_runs) / (runs - 1)
  problem_square = runs * float(of_problems @ of_problems + extra) / count
  rest_square = float(np.sum(rest**2)) / ((runs - 1) * (count - 1))
  square = max(
    run_square + problem_square - rest_square, run_square, problem_square
  )
  freedom = square**2 / (run_square**2 / (runs - 1) + problem_square**2 / count)
  half = float(stdtrit(freedom, 0.975)) * math.sqrt(square / values.size)
  return mean, Interval(max(mean - half, -1.0), min(mean + half, 1.0))


def over_runs(values: Float[np.ndarray, " S"]) -> tuple[float, Interval]:
  """The mean of a number per run, and Student's 95 % for it.

  Args:
    values: such as differences of two runs of one seed; at least two.
  """
  count = len(values)
  if count < 2:
    raise ValueError(f"an interval needs at least 2 runs, got {count}")
  mean = float(np.mean(values))
  error = float(np.std(values, ddof=1)) / math.sqrt(count)
  half = float(stdtrit(count - 1, 0.975)) * error
  return mean, Interval(mean - half, mean + half)
