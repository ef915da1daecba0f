"""Milliseconds of a step of each objective, all in one process.

For an idle machine. A step is a whole one: rollout, scores, update.
"""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.study import runs
from benchmarks.study.entries import Entry
from opd_jax import parsing
from opd_jax.config import RunConfig

WARM_UP, STEPS = 3, 10


def measure(entries: Sequence[Entry], work: Path) -> dict[str, Any]:
  """The medians by entry, and the circumstances."""
  found = {}
  for entry in entries:
    found[entry.name] = round(1e3 * statistics.median(_seconds(entry, work)), 1)
    print(f"{entry.name} {found[entry.name]} ms", flush=True)
  return {**runs.circumstances(), "milliseconds": found}


def _seconds(entry: Entry, work: Path) -> list[float]:
  values = runs.resolved(runs.config_values(entry, 0), work)
  task, batches = runs.distillation(parsing.parse(RunConfig, values))
  state = task.initial_state()
  task.compile(state)
  seconds = []
  for step in range(WARM_UP + STEPS):
    batch = next(batches)
    start = time.perf_counter()
    state, *rest = task.step(state, batch)
    jax.block_until_ready((state, rest))
    if step >= WARM_UP:
      seconds.append(time.perf_counter() - start)
  return seconds
