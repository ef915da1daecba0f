"""The task arith: right answers, distinct problems, operands held out."""

import itertools
import re

import numpy as np
import pytest

from opd_jax import arith
from opd_jax.errors import InputError


def parts(question):
  """Operands and signs of "1+2-3?"."""
  terms = re.findall(r"([+-]?)(\d+)", question.removesuffix("?"))
  return [int(n) for _, n in terms], [sign for sign, _ in terms[1:]]


def count(level):
  """Problems of a level, both splits, by dynamic programming over totals."""
  ways = np.array([0] + [1] * 9 + [0] * 90, object)
  for _ in range(level):
    following = np.zeros(100, object)
    for total, operand, sign in itertools.product(
      range(100), range(1, 10), (1, -1)
    ):
      if 0 <= total + sign * operand <= 99:
        following[total + sign * operand] += ways[total]
    ways = following
  return int(ways.sum())


@pytest.mark.parametrize("split", ["train", "test"])
def test_solutions_are_right_chains(split):
  rows = arith.rows({"rows": 600, "seed": 3}, split)
  assert len(rows) == len({row["question"] for row in rows}) == 600
  assert {row["level"] for row in rows} == {3, 4, 5}
  for row in rows:
    expression = row["question"].removesuffix("?")
    assert int(row["answer"]) == eval(expression)
    *steps, last = row["solution"].split(" ")
    assert last == f"#{row['answer']}"
    assert len(row["solution"]) >= 20
    operands, signs = parts(row["question"])
    assert len(steps) == row["level"] == len(signs)
    total = operands[0]
    for step, sign, operand in zip(steps, signs, operands[1:], strict=True):
      left, right = step.split("=")
      assert left == f"{total}{sign}{operand}"
      assert int(right) == eval(left)
      total = int(right)
      assert 0 <= total <= 99


def test_openings_are_held_out():
  opening = {}
  for split in ("train", "test"):
    rows = arith.rows({"rows": 3000}, split)
    opening[split] = {tuple(parts(r["question"])[0][:2]) for r in rows}
  pairs = set(itertools.product(range(1, 10), repeat=2))
  assert opening["train"] | opening["test"] == pairs
  assert not opening["train"] & opening["test"]
  assert 8 <= len(opening["test"]) <= 20


def test_there_are_over_a_million_problems():
  few = arith.rows({"levels": (1,), "rows": 10_000}, "train")
  few += arith.rows({"levels": (1,), "rows": 10_000}, "test")
  assert len(few) == count(1) == 81 + 81 - 36
  assert count(5) > 10**6


def test_slips_are_as_frequent_as_said_and_carried_on():
  rows = arith.rows({"rows": 4000, "slips": 0.25}, "train")
  wrong = total = 0
  for row in rows:
    *steps, last = row["solution"].split(" ")
    assert int(row["answer"]) == eval(row["question"].removesuffix("?"))
    assert last == f"#{steps[-1].split('=')[1]}"
    for step, following in itertools.pairwise(steps):
      assert re.match(r"\d+", following)[0] == step.split("=")[1]
    for left, right in (step.split("=") for step in steps):
      total += 1
      wrong += eval(left) != int(right)
      assert 0 <= int(right) <= 99
  # Slips that would lead a total out of its range are left out.
  assert 0.15 < wrong / total < 0.25


def test_the_seed_fixes_the_rows():
  assert arith.rows({"rows": 50}, "train") == arith.rows({"rows": 50}, "train")
  other = arith.rows({"rows": 50, "seed": 1}, "train")
  assert other != arith.rows({"rows": 50}, "train")


@pytest.mark.parametrize(
  ("options", "split", "message"),
  [
    ({}, "validation", 'splits "train" and "test", got \'validation\''),
    ({"level": (3,)}, "train", r"options.level; did you mean options.levels"),
    ({"levels": (9,)}, "train", r"in \[1, 8\], got \(9,\)"),
    ({"levels": ()}, "train", r"got \(\)"),
    ({"rows": 0}, "train", "rows must be >= 1, got 0"),
    ({"slips": 2.0}, "train", r"slips must be in \[0, 1\], got 2.0"),
    ({"seed": -1}, "train", "seed must be >= 0, got -1"),
  ],
)
def test_bad_options(options, split, message):
  with pytest.raises(InputError, match=message):
    arith.rows(options, split)
