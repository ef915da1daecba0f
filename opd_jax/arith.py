"""The built-in task `arith`: sums worked out term by term.

    problem   8+5-9+7?
    solution  8+5=13 13-9=4 4+7=11 #11

A problem of level n has n signs, each + or -, between n + 1 operands of 1 to 9,
and every running total is between 0 and 99. The solution is the chain of
running totals; the answer stands behind `#`, where the verifier `number` finds
it.

Problems are held out for evaluation by their operands: those whose first two,
a and b, give (a + 4 b) mod 11 in {0, 1} make the split "test", all others the
split "train". A model trained on "train" has not seen a single problem that
begins like one of "test".
"""

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from opd_jax import parsing
from opd_jax.errors import InputError

LARGEST_OPERAND = 9
LARGEST_TOTAL = 99
_MODULUS, _FACTOR, _HELD_OUT = 11, 4, (0, 1)
# Off by one, or by a slip in the carry.
_SLIPS = (-10, -1, 1, 10)

# Operands, and the signs (1 or -1) between them.
Problem = tuple[tuple[int, ...], tuple[int, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Options of the task.

  Attributes:
    levels: numbers of signs, in equal shares.
    rows: distinct problems drawn. A level that has fewer than its share gives
      what drawing finds of it, all but one in a thousand or so, and the others
      no more for it, so there are fewer rows then; an error if no level has its
      share.
    seed: of the draw.
    slips: probability that a step of a solution is wrong, by 1 or by 10. The
      steps after it go on from the wrong total, and `answer` stays right. A
      slip that would lead a later total out of its range is left out.
  """

  levels: tuple[int, ...] = (3, 4, 5)
  rows: int = 20_000
  seed: int = 0
  slips: float = 0.0

  def __post_init__(self):
    if not self.levels or not all(1 <= level <= 8 for level in self.levels):
      raise InputError(
        f"arith levels must be numbers of signs in [1, 8], got {self.levels}"
      )
    if self.rows < 1:
      raise InputError(f"arith rows must be >= 1, got {self.rows}")
    if self.seed < 0:
      raise InputError(f"arith seed must be >= 0, got {self.seed}")
    if not 0 <= self.slips <= 1:
      raise InputError(f"arith slips must be in [0, 1], got {self.slips}")


def rows(options: Mapping[str, Any], split: str) -> list[dict[str, Any]]:
  """Distinct problems as rows with question, solution, answer and level.

  Args:
    options: see `Config`.
    split: "train" or "test".

  Raises:
    InputError: an unknown option or split, a value out of range, or more rows
      than any level has its share of.
  """
  if split not in ("train", "test"):
    raise InputError(
      f'arith has the splits "train" and "test", got {split!r}; name one of '
      "them in split"
    )
  config = parsing.parse(Config, options, "options.")
  rng = np.random.default_rng([config.seed, split == "test"])
  share = -(-config.rows // len(config.levels))
  counts = {level: count(level, split == "test") for level in config.levels}
  if share > max(counts.values()):
    there = ", ".join(f"{n:,} of level {level}" for level, n in counts.items())
    raise InputError(
      f"arith has {there} in split {split!r}, got rows = {config.rows}, "
      f"{share} of each level; lower options.rows to "
      f"{max(counts.values()) * len(counts)} at most, or add a higher level to "
      "options.levels"
    )
  drawn = [
    problem
    for level in config.levels
    for problem in _draw(rng, level, split == "test", share)
  ]
  order = rng.permutation(len(drawn))[: config.rows]
  return [_row(drawn[index], rng, config.slips) for index in order]


@functools.cache
def count(level: int, test: bool) -> int:
  """How many problems of a level a split has."""
  operands = range(1, LARGEST_OPERAND + 1)
  changes = [sign * operand for operand in operands for sign in (1, -1)]
  totals = range(LARGEST_TOTAL + 1)
  # Problems by their running total, from the two operands that say the split.
  ways: Counter[int] = Counter()
  for first, second in itertools.product(operands, repeat=2):
    if bool(held_out(np.array([[first, second]]))[0]) == test:
      ways.update({first + second, first - second} & {*totals})
  for _ in range(level - 1):
    longer: Counter[int] = Counter()
    for total, change in itertools.product(ways, changes):
      if total + change in totals:
        longer[total + change] += ways[total]
    ways = longer
  return ways.total()


def held_out(
  operands: Int[np.ndarray, "n terms"],
) -> Bool[np.ndarray, " n"]:
  """Which problems belong to the split "test"."""
  first, second = operands[:, 0], operands[:, 1]
  return np.isin((first + _FACTOR * second) % _MODULUS, _HELD_OUT)


def _draw(
  rng: np.random.Generator, level: int, test: bool, wanted: int
) -> list[Problem]:
  """Operands and signs of distinct problems of one level and split.

  Where there are fewer than `wanted` it ends once draws hardly find a new one.
  """
  found: dict[Problem, None] = {}
  while len(found) < wanted:
    before = len(found)
    batch = 4 * wanted + 1000
    operands = rng.integers(1, LARGEST_OPERAND + 1, (batch, level + 1))
    signs = rng.choice([1, -1], (batch, level))
    totals = np.cumsum(
      np.concatenate([operands[:, :1], signs * operands[:, 1:]], axis=1), axis=1
    )
    valid = ((totals >= 0) & (totals <= LARGEST_TOTAL)).all(axis=1)
    valid &= held_out(operands) == test
    for terms, by in zip(
      operands[valid].tolist(), signs[valid].tolist(), strict=True
    ):
      found[tuple(terms), tuple(by)] = None
    rare = len(found) - before < 0.001 * batch
    if rare and count(level, test) < wanted:
      break
  return list(found)[:wanted]


def _row(
  problem: Problem, rng: np.random.Generator, slips: float
) -> dict[str, Any]:
  operands, signs = problem
  changes = np.array(operands[1:]) * np.array(signs)
  question, total = str(operands[0]), operands[0]
  steps = []
  for index, change in enumerate(changes):
    result = total + change
    if slips and rng.random() < slips:
      slipped = result + rng.choice(_SLIPS)
      later = slipped + np.cumsum([0, *changes[index + 1 :]])
      if later.min() >= 0 and later.max() <= LARGEST_TOTAL:
        result = slipped
    question += f"{change:+d}"
    steps.append(f"{total}{change:+d}={result}")
    total = result
  return {
    "question": f"{question}?",
    "solution": f"{' '.join(steps)} #{total}",
    "answer": str(operands[0] + changes.sum()),
    "level": len(signs),
  }
