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
    rows: distinct problems drawn; fewer if there are no more.
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
    InputError: an unknown option or split, or a value out of range.
  """
  if split not in ("train", "test"):
    raise InputError(
      f'arith has the splits "train" and "test", got {split!r}; name one of '
      "them in split"
    )
  config = parsing.parse(Config, options, "options.")
  rng = np.random.default_rng([config.seed, split == "test"])
  share = -(-config.rows // len(config.levels))
  drawn = [
    problem
    for level in config.levels
    for problem in _draw(rng, level, split == "test", share)
  ]
  order = rng.permutation(len(drawn))[: config.rows]
  return [_row(drawn[index], rng, config.slips) for index in order]


def held_out(
  operands: Int[np.ndarray, "n terms"],
) -> Bool[np.ndarray, " n"]:
  """Which problems belong to the split "test"."""
  first, second = operands[:, 0], operands[:, 1]
  return np.isin((first + _FACTOR * second) % _MODULUS, _HELD_OUT)


def _draw(
  rng: np.random.Generator, level: int, test: bool, count: int
) -> list[Problem]:
  """Operands and signs of distinct problems of one level and split.

  Ends before `count` once draws hardly find a new problem.
  """
  found: dict[Problem, None] = {}
  while len(found) < count:
    before = len(found)
    batch = 4 * count + 1000
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
    if len(found) - before < 0.001 * batch:
      break
  return list(found)[:count]


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
