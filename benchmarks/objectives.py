"""All objectives on the quickstart's pair, and claims of papers in pairs.

    python -m benchmarks.objectives --work=DIR [--only=NAME,...] [--seeds=1]
    python -m benchmarks.objectives --timing

Runs what benchmarks/results/objectives.json lacks, a process for each run, one
after the other; a run that is there with the same config is not repeated.
Teachers and students are left in DIR. `python docs/generate.py` writes
docs/results.md from the file.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.study import results, runs
from benchmarks.study.entries import ENTRIES, REPO


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--work", type=Path, required=True)
  parser.add_argument("--only", help="names of entries, with commas")
  parser.add_argument("--results", type=Path, default=results.FILE)
  options = parser.parse_args()
  names = options.only.split(",") if options.only else list(ENTRIES)
  work = options.work.absolute()
  chosen = [ENTRIES[name] for name in names]
  for entry, seed in results.missing(chosen, results.read(options.results)):
    print(f"{entry.name}, seed {seed}", flush=True)
    command = [sys.executable, "-m", "benchmarks.study.runs"]
    command += [f"--entry={entry.name}", f"--seed={seed}", f"--work={work}"]
    place = runs.folder(work, entry, seed)
    place.mkdir(parents=True, exist_ok=True)
    if not (place / "record.json").exists():
      with (place / "log").open("w") as log:
        done = subprocess.run(command, cwd=REPO, stdout=log, stderr=log)
      if done.returncode:
        print(f"  failed: see {place / 'log'}", flush=True)
        continue
    record = json.loads((place / "record.json").read_text())
    results.add(record, options.results)


if __name__ == "__main__":
  main()
