"""All objectives on the quickstart's pair, and claims of papers in pairs.

    python -m benchmarks.objectives --work=DIR [--only=NAME,...] [--seeds=N]
    python -m benchmarks.objectives --work=DIR --timing

The first makes the runs that benchmarks/results/objectives.json lacks, a
process each and one after the other. A run that is there with the same config
is not repeated; one that was interrupted resumes. What they leave is in DIR.
The second times ten steps of each objective, on a machine that is idle.
`python -m docs.generate` then writes docs/results.md from the file.

What is run is in `study/entries.py`; what is claimed, and what would show it,
in `study/claims.py`.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.study import results, runs, timing
from benchmarks.study.entries import ENTRIES, REPO, TABLE, Entry


def make(entries: Sequence[Entry], work: Path, file: Path) -> int:
  """Makes what is missing; returns how many runs failed."""
  failed = 0
  for entry, seed in results.missing(entries, results.read(file).runs):
    print(f"{entry.name}, seed {seed}", flush=True)
    place = runs.folder(work, entry, seed)
    place.mkdir(parents=True, exist_ok=True)
    record, log = place / "record.json", place / "log"
    if not record.exists():
      command = [sys.executable, "-m", "benchmarks.study.runs"]
      command += [f"--entry={entry.name}", f"--seed={seed}", f"--work={work}"]
      with log.open("w") as stream:
        done = subprocess.run(command, stdout=stream, stderr=stream)
      if done.returncode:
        print(f"  failed, see {log}", flush=True)
        failed += 1
        continue
    results.add(json.loads(record.read_text()), file)
  return failed


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--work", type=Path, required=True)
  parser.add_argument("--results", type=Path, default=results.FILE)
  parser.add_argument("--only", help="names of entries, with commas")
  parser.add_argument("--seeds", type=int, help="of each entry, at most")
  parser.add_argument("--timing", action="store_true")
  options = parser.parse_args()
  work, file = options.work.absolute(), options.results.absolute()
  os.chdir(REPO)
  if options.timing:
    trained = [entry for entry in TABLE if entry.command == "train"]
    found = results.read(file)
    timings = timing.measure(trained, work)
    results.write(dataclasses.replace(found, timings=timings), file)
    return 0
  names = options.only.split(",") if options.only else [*ENTRIES]
  chosen = [
    dataclasses.replace(entry, seeds=entry.seeds[: options.seeds])
    for entry in map(ENTRIES.__getitem__, names)
  ]
  return int(make(chosen, work, file) > 0)


if __name__ == "__main__":
  sys.exit(main())
