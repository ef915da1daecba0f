"""The file of results: read, written, and which runs it still lacks."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.study import runs
from benchmarks.study.entries import ENTRIES, REPO, Entry

FILE = REPO / "benchmarks" / "results" / "objectives.json"

Record = dict[str, Any]


def read(file: Path = FILE) -> list[Record]:
  """The records of all runs; none if there is no file."""
  if not file.exists():
    return []
  return json.loads(file.read_text())["runs"]


def write(records: Sequence[Record], file: Path = FILE) -> None:
  """A run a line, in the order of the entries."""
  order = {name: index for index, name in enumerate(ENTRIES)}
  records = sorted(records, key=lambda r: (order[r["entry"]], r["seed"]))
  lines = ",\n".join(json.dumps(record) for record in records)
  file.parent.mkdir(parents=True, exist_ok=True)
  partial = file.with_suffix(".partial")
  partial.write_text(f'{{"runs": [\n{lines}\n]}}\n')
  partial.replace(file)


def add(record: Record, file: Path = FILE) -> None:
  """Puts a run in place of what there was of this entry and seed."""
  key = (record["entry"], record["seed"])
  others = [r for r in read(file) if (r["entry"], r["seed"]) != key]
  write([*others, record], file)


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
