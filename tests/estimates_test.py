"""Estimates against enumeration, intervals against simulation."""

import itertools
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from scipy.special import stdtrit

from opd_jax import estimates

TRIALS = 8000


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_is_the_mean_over_all_subsets(n):
  right = np.arange(n)[None, :] < np.arange(n + 1)[:, None]
  for k in range(1, n + 1):
    found = estimates.pass_at(right, k)
    for row, value in zip(right, found, strict=True):
      subsets = list(itertools.combinations(row, k))
      assert value == pytest.approx(np.mean([any(s) for s in subsets]))


def enumerated_majority(votes, right, k):
  """The mean over all subsets, in fractions."""
  total, count = Fraction(0), 0
  for subset in itertools.combinations(range(len(votes)), k):
    count += 1
    tally = Counter(votes[i] for i in subset if votes[i] is not None)
    if not tally:
      continue
    most = max(tally.values())
    winners = [vote for vote, times in tally.items() if times == most]
    for winner in winners:
      marks = [right[i] for i, vote in enumerate(votes) if vote == winner]
      total += Fraction(sum(map(int, marks)), len(marks) * len(winners))
  return total / count


def test_majority_at_is_the_mean_over_all_subsets():
  rng = np.random.default_rng(0)
  for n in range(1, 9):
    votes = rng.integers(0, rng.integers(1, 5, (30, 1)), (30, n)).tolist()
    # Answer 0 is right, 3 is none, and of 2 the verifier is not sure.
    votes = [[None if v == 3 else v for v in row] for row in votes]
    right = np.array(
      [
        [v == 0 or (v == 2 and rng.random() < 0.5) for v in row]
        for row in votes
      ]
    )
    for k in range(1, n + 1):
      found = estimates.majority_at(votes, right, k)
      for row, marks, value in zip(votes, right, found, strict=True):
        assert value == pytest.approx(float(enumerated_majority(row, marks, k)))


def test_majority_by_hand():
  votes = [["a", "a", "b", "c"], ["a", "a", "b", "b"], [None, None, None, "a"]]
  right = np.array([[vote == "a" for vote in row] for row in votes])
  np.testing.assert_allclose(
    estimates.majority_at(votes, right, 4), [1, 0.5, 1]
  )
  np.testing.assert_allclose(
    estimates.majority_at(votes, right, 1), [0.5, 0.5, 0.25]
  )


@pytest.mark.parametrize("k", [0, 3])
def test_k_beyond_the_samples_is_an_error(k):
  right = np.ones((1, 2), bool)
  with pytest.raises(ValueError, match=r"\[1, 2\]"):
    estimates.pass_at(right, k)
  with pytest.raises(ValueError, match=r"\[1, 2\]"):
    estimates.majority_at([["a", "a"]], right, k)


def draws(rng, problems, samples, mean, correlation):
  """Per-problem means of problems whose difficulty is beta-distributed.

  `correlation` is that of two samples of one problem.
  """
  size = (TRIALS, problems)
  strength = 1 / correlation - 1
  chance = rng.beta(mean * strength, (1 - mean) * strength, size)
  return rng.binomial(samples, chance) / samples


def coverage(values, samples, truth):
  found = [estimates.interval(row, samples) for row in values]
  return np.mean([low <= truth <= high for low, high in found])


# (problems, samples, accuracy, correlation), at least 9 answers' worth of right
# and of wrong ones each.
SETTINGS = [
  (30, 2, 0.5, 0.3),
  (30, 4, 0.3, 0.3),
  (30, 4, 0.5, 0.6),
  (30, 8, 0.1, 0.1),
  (30, 8, 0.3, 0.6),
  (60, 4, 0.9, 0.3),
  (60, 8, 0.7, 0.05),
  (100, 1, 0.5, 0.3),
  (100, 2, 0.9, 0.3),
  (100, 4, 0.05, 0.1),
  (100, 8, 0.95, 0.3),
  (300, 1, 0.3, 0.5),
  (300, 4, 0.05, 0.3),
  (300, 8, 0.95, 0.6),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_interval_covers(setting):
  """95 +- 1.5 %; the error of the simulation itself is 0.25 %."""
  problems, samples, mean, correlation = setting
  rng = np.random.default_rng(SETTINGS.index(setting))
  values = draws(rng, problems, samples, mean, correlation)
  assert 0.935 <= coverage(values, samples, mean) <= 0.965


@pytest.mark.parametrize(
  "setting",
  [
    (30, 8, 0.05, 0.6),
    (60, 8, 0.95, 0.6),
    (100, 8, 0.02, 0.1),
    (30, 4, 0.9, 0.3),
  ],
  ids=str,
)
def test_the_interval_covers_few_right_or_wrong_answers_roughly(setting):
  _, samples, mean, _ = setting
  values = draws(np.random.default_rng(0), *setting)
  assert 0.92 <= coverage(values, samples, mean) <= 0.98


def test_one_wrong_answer_changes_little():
  """That the others were right says little of how wrong answers cluster."""
  values = np.ones(200)
  alone = estimates.interval(values, 8)
  values[0] = 7 / 8
  one = estimates.interval(values, 8)
  assert one.low == pytest.approx(alone.low, abs=0.007)
  assert alone.high == 1 > one.high


def test_the_interval_covers_one_sample_each_on_average_over_accuracies():
  """Of 30 answers there are 31 results: at one accuracy the coverage jumps."""
  rng = np.random.default_rng(0)
  truth = rng.uniform(0.05, 0.95, TRIALS)
  values = rng.random((TRIALS, 30)) < truth[:, None]
  found = [estimates.interval(row.astype(float), 1) for row in values]
  covered = [
    low <= mean <= high for (low, high), mean in zip(found, truth, strict=True)
  ]
  assert 0.935 <= np.mean(covered) <= 0.965


def pass_at_coverage(problems, samples, k, mean, correlation):
  """Of pass@k of problems whose difficulty is beta-distributed."""
  rng = np.random.default_rng(0)
  strength = 1 / correlation - 1
  right, wrong = mean * strength, (1 - mean) * strength
  chance = rng.beta(right, wrong, (TRIALS, problems))
  counts = rng.binomial(samples, chance)
  of_count = estimates.pass_at(np.tri(samples + 1, samples, -1, bool), k)
  # 1 - E (1 - c)^k, c being Beta(right, wrong).
  powers = np.arange(k)
  truth = 1 - np.prod((wrong + powers) / (right + wrong + powers))
  return coverage(of_count[counts], samples / k, truth)


@pytest.mark.parametrize(
  "setting",
  [
    (100, 8, 4, 1 / 3, 1 / 4),
    (30, 8, 2, 0.3, 0.3),
    (100, 8, 8, 0.1, 0.3),
    (300, 8, 4, 0.05, 0.1),
  ],
  ids=str,
)
def test_the_interval_of_pass_at_k_covers(setting):
  assert 0.935 <= pass_at_coverage(*setting) <= 0.965


@pytest.mark.parametrize(
  "setting",
  [(30, 8, 4, 0.5, 0.1), (100, 8, 2, 0.5, 0.02), (100, 8, 4, 0.3, 0.02)],
  ids=str,
)
def test_the_interval_of_pass_at_k_is_too_wide_where_problems_are_alike(
  setting,
):
  """Subsets that overlap know more than n / k samples, but never less."""
  assert 0.965 <= pass_at_coverage(*setting) <= 0.995


def test_one_sample_each_is_wilsons_interval():
  """19 of 30: 45.5 to 78.1 %, by the formula in any text book."""
  values = np.repeat([1.0, 0.0], [19, 11])
  low, high = estimates.interval(values, 1)
  assert (round(low, 4), round(high, 4)) == (0.4551, 0.7813)
  # Samples that all agree say no more than one of each.
  assert estimates.interval(values, 8) == (low, high)


def test_samples_narrow_it_as_far_as_problems_agree():
  rng = np.random.default_rng(0)

  def width(samples, correlation):
    values = draws(rng, 100, samples, 0.5, correlation)[:200]
    ends = np.array([estimates.interval(row, samples) for row in values])
    return np.mean(ends[:, 1] - ends[:, 0])

  assert width(8, 0.01) == pytest.approx(width(1, 0.5) / 8**0.5, rel=0.1)
  assert width(8, 0.9) > 0.9 * width(1, 0.5)


@pytest.mark.parametrize("value", [0.0, 0.5, 0.7, 1.0])
def test_the_interval_has_a_width_where_all_problems_are_alike(value):
  low, high = estimates.interval(np.full(50, value), 8)
  assert 0 <= low <= value <= high <= 1
  assert 0.05 < high - low < 0.15


def test_one_problem_says_nothing_of_others():
  assert estimates.interval(np.array([0.5]), 8) == (0, 1)
  mean, interval = estimates.difference(np.zeros(1), np.ones(1), 8)
  assert mean == 1
  assert interval == (-1, 1)


@pytest.mark.parametrize(
  ("problems", "samples", "mean", "lift"),
  [
    (30, 4, 0.3, 0.1),
    (100, 1, 0.5, 0.3),
    (100, 8, 0.3, 0.0),
    (300, 4, 0.9, 0.05),
  ],
)
def test_the_interval_of_a_difference_covers(problems, samples, mean, lift):
  rng = np.random.default_rng(0)
  strength = 1.0 / 0.3 - 1
  size = (TRIALS, problems)
  chance = rng.beta(mean * strength, (1 - mean) * strength, size)
  better = chance + lift / (1 - mean) * (1 - chance)
  before, after = (rng.binomial(samples, c) / samples for c in (chance, better))
  covered = []
  for pair in zip(before, after, strict=True):
    _, (low, high) = estimates.difference(*pair, samples)
    covered.append(low <= lift <= high)
  assert 0.935 <= np.mean(covered) <= 0.965


def test_a_difference_is_paired_and_has_a_width():
  rng = np.random.default_rng(0)
  before = rng.random(100)
  after = np.clip(before + 0.1 + 0.01 * rng.standard_normal(100), 0, 1)
  mean, (low, high) = estimates.difference(before, after, 8)
  assert low < mean < high
  assert high - low < 0.03
  assert estimates.difference(after, before, 8)[0] == pytest.approx(-mean)
  mean, (low, high) = estimates.difference(before, before, 8)
  assert mean == 0
  assert -0.01 < low < 0 < high < 0.01


# (runs, problems, samples, standard deviation of runs)
CROSSED = [
  (3, 250, 8, 0.0),
  (3, 250, 8, 0.01),
  (3, 250, 8, 0.03),
  (5, 250, 8, 0.01),
  (5, 60, 4, 0.03),
]


def crossed_differences(rng, runs, problems, samples, spread):
  """Of two ways to train that are equally good, on the same problems."""
  chance = rng.beta(6.3, 2.7, problems)

  def accuracies():
    shift = rng.normal(0, spread, (runs, 1))
    return rng.binomial(samples, np.clip(chance + shift, 0, 1)) / samples

  return accuracies() - accuracies()


@pytest.mark.parametrize("setting", CROSSED, ids=str)
def test_the_interval_over_runs_and_problems_covers(setting):
  rng = np.random.default_rng(CROSSED.index(setting))
  covered = []
  for _ in range(2000):
    values = crossed_differences(rng, *setting)
    mean, (low, high) = estimates.crossed(values, setting[2])
    assert mean == pytest.approx(np.mean(values))
    covered.append(low <= 0 <= high)
  assert 0.93 <= np.mean(covered) <= 0.99


def test_the_interval_over_problems_alone_does_not_cover_other_runs():
  rng = np.random.default_rng(0)
  covered = []
  for _ in range(2000):
    values = crossed_differences(rng, 3, 250, 8, 0.03)
    _, (low, high) = estimates.difference(
      np.zeros(250), values.mean(axis=0), 24
    )
    covered.append(low <= 0 <= high)
  assert np.mean(covered) < 0.5


def test_crossed_by_hand():
  """Two runs, three problems, by the analysis of variance; in twelfths.

  Means: runs 2, 6; problems 3, 3, 6; all 4. Sums of squares: runs
  3 (4 + 4) = 24, problems 2 (1 + 1 + 4) = 12, rest (1, 1, -2, -1, -1, 2) 12.
  """
  values = np.array([[2, 2, 2], [4, 4, 10]]) / 12
  mean, (low, high) = estimates.crossed(values, 10**9)
  assert mean == pytest.approx(4 / 12)
  # M_S = 24 / 1, M_N = 12 / 3 (a problem is added), M_R = 12 / 2; and
  # M_S + M_N - M_R = 22 is less than M_S.
  square, freedom = 24 / 144, 24**2 / (24**2 / 1 + 4**2 / 3)
  half = stdtrit(freedom, 0.975) * (square / 6) ** 0.5
  assert (low, high) == pytest.approx(
    (max(4 / 12 - half, -1), min(4 / 12 + half, 1))
  )


def test_one_run_is_the_paired_difference():
  rng = np.random.default_rng(0)
  values = rng.uniform(-1, 1, (1, 50))
  assert estimates.crossed(values, 8) == estimates.difference(
    np.zeros(50), values[0], 8
  )


def test_crossed_has_a_width():
  _, (low, high) = estimates.crossed(np.full((3, 50), 0.5), 8)
  assert 0.49 < low < 0.5 < high < 0.51


def test_over_runs_is_students_interval():
  """0.1, 0.2, 0.6: mean 0.3, s = sqrt(0.07); 4.3027 at 2 degrees."""
  mean, (low, high) = estimates.over_runs(np.array([0.1, 0.2, 0.6]))
  half = 4.30265 * (0.07 / 3) ** 0.5
  assert mean == pytest.approx(0.3)
  assert (low, high) == pytest.approx((0.3 - half, 0.3 + half), abs=1e-5)
  with pytest.raises(ValueError, match="2 runs"):
    estimates.over_runs(np.array([0.1]))
