"""The file of results: read, written, and what it still lacks."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.study import runs
from benchmarks.study.entries import ENTRIES, REPO, Entry

FILE = REPO / "benchmarks" / "results" / "objectives.json"

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
  """What is in the file.

  Attributes:
    runs: a record each; see `runs.run`.
    timings: milliseconds of a step by entry, and their circumstances; None
      before they were measured.
  """

  runs: Sequence[Record] = ()
  timings: Record | None = None


def read(file: Path = FILE) -> Results:
  """All there is; nothing if there is no file."""
  if not file.exists():
    return Results()
  return Results(**json.loads(file.read_text()))


def write(found: Results, file: Path = FILE) -> None:
  """A run a line, in the order of the entries."""
  order = {name: index for index, name in enumerate(ENTRIES)}
  known = [record for record in found.runs if record["entry"] in order]
  runs = sorted(known, key=lambda r: (order[r["entry"]], r["seed"]))
  lines = ",\n".join(json.dumps(record) for record in runs)
  timings = json.dumps(found.timings)
  file.parent.mkdir(parents=True, exist_ok=True)
  partial = file.with_suffix(".partial")
  partial.write_text(f'{{"timings": {timings},\n"runs": [\n{lines}\n]}}\n')
  partial.replace(file)


def add(record: Record, file: Path = FILE) -> None:
  """Puts a run in place of what there was of its entry and seed."""
  key = (record["entry"], record["seed"])
  found = read(file)
  others = [r for r in found.runs if (r["entry"], r["seed"]) != key]
  write(dataclasses.replace(found, runs=[*others, record]), file)


def missing(
  entries: Sequence[Entry], records: Sequence[Record]
) -> list[tuple[Entry, int]]:
  """The runs that are not there with the present config.

  First the first seed of each entry, then the second ones: what there is can
  be compared early, and what others read comes before them.
  """
  there = {(r["entry"], r["seed"], r["digest"]) for r in records}
  wanted = [
    (turn, entry, seed)
    for entry in entries
    for turn, seed in enumerate(entry.seeds)
    if (entry.name, seed, runs.digest(entry, seed)) not in there
  ]
  wanted.sort(key=lambda one: one[0])
  return [(entry, seed) for _, entry, seed in wanted]
