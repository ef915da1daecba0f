"""The task arith: right answers, distinct problems, operands held out."""

import collections
import hashlib
import itertools
import re
import runpy

import numpy as np
import pytest

from opd_jax import arith
from opd_jax.errors import InputError
from tests.conftest import REPO


def teacher_config():
  path = REPO / "configs" / "arith_teacher.py"
  return runpy.run_path(str(path))["get_config"]()


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
  for level in (1, 2, 5):
    both = arith.count(level, False) + arith.count(level, True)
    assert both == count(level)
  assert arith.count(1, False) + arith.count(1, True) == 81 + 81 - 36
  assert count(5) > 10**6


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("split", ["train", "test"])
def test_all_problems_can_be_had(level, split):
  """Every one that can be written down, however rarely it is drawn."""
  written = set()
  signs = itertools.product("+-", repeat=level)
  numbers = itertools.product(range(1, 10), repeat=level + 1)
  for these, operands in itertools.product(list(signs), numbers):
    terms = itertools.chain.from_iterable(
      zip(these, map(str, operands[1:]), strict=True)
    )
    question = f"{operands[0]}{''.join(terms)}"
    stops = [eval(question[:end]) for end in range(1, 2 * level + 2, 2)]
    opening = np.array([operands[:2]])
    if min(stops) >= 0 and arith.held_out(opening)[0] == (split == "test"):
      written.add(f"{question}?")
  rows = arith.rows({"levels": (level,), "rows": len(written)}, split)
  assert {row["question"] for row in rows} == written
  with pytest.raises(
    InputError,
    match=rf"arith has {len(written):,} of level {level} in split '{split}', "
    rf"got rows = {len(written) + 1}.* lower options\.rows to {len(written)} ",
  ):
    arith.rows({"levels": (level,), "rows": len(written) + 1}, split)


def test_a_level_with_too_few_problems_gives_what_it_has():
  rows = arith.rows({"levels": (1, 3), "rows": 1000}, "train")
  counts = collections.Counter(row["level"] for row in rows)
  assert counts == {1: arith.count(1, False), 3: 500}


def test_the_rows_of_the_shipped_recipes():
  """Another draw, and the models in checkpoints/ cannot be made again."""
  options = teacher_config()["data"]["sources"]["arith"]["options"]
  rows = arith.rows(options, "train")
  counts = collections.Counter(row["level"] for row in rows)
  assert counts == {3: 24391, 4: 33334, 5: 33334}
  text = "".join(f"{row['question']}{row['solution']}" for row in rows)
  digest = hashlib.sha256(text.encode()).hexdigest()
  assert digest.startswith("26cb400397a3484a")


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
