"""What a run tells: JSONL and TensorBoard files, and a line on the screen.

`metrics.jsonl` and `samples.jsonl` hold one object a record, `{"step": n, ...}`
where n counts the updates done. Names are `stage/name`.
"""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import rich.console
import rich.progress

from opd_jax.imports import without_torch

with without_torch("tensorboardX"):
  import tensorboardX

# Of metrics and of samples; a resumed run goes on with them.
LOGS = ("metrics.jsonl", "samples.jsonl")

# What `Progress` shows: metric, label, format.
_SHOWN = (
  ("train/loss", "loss", "{:.4f}"),
  ("held_out/loss", "held-out", "{:.4f}"),
  ("teacher/accuracy", "teacher accuracy", "{:.3f}"),
  ("eval/accuracy", "accuracy", "{:.3f}"),
  ("train/tokens_per_second", "tokens/s", "{:,.0f}"),
)


class Writer:
  """Writes the records of a run into its folder; for one process only."""

  def __init__(self, workdir: str | Path, resumed_step: int | None = None):
    """Opens the files of a run.

    Args:
      workdir: the run's folder; created if need be.
      resumed_step: step of the restored checkpoint: records of later steps are
        dropped, so that the log becomes that of an uninterrupted run. None
        starts afresh and drops all.
    """
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    keep = -1 if resumed_step is None else resumed_step
    self._metrics, self._samples = (
      _reopen(workdir / name, keep) for name in LOGS
    )
    # Names of event files count seconds: a quick restart must not reuse one.
    self._board = tensorboardX.SummaryWriter(
      logdir=str(workdir / "tensorboard"),
      purge_step=keep + 1,
      filename_suffix=f".{keep + 1}",
    )

  def metrics(self, step: int, values: Mapping[str, float]) -> None:
    """Writes one record; a value that is not finite is left out of it."""
    finite = {
      name: float(value)
      for name, value in values.items()
      if math.isfinite(value)
    }
    _append(self._metrics, {"step": step, **finite})
    for name, value in finite.items():
      self._board.add_scalar(name, value, step)

  def samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
    """Writes one record per sample, such as a prompt and its completion."""
    for sample in samples:
      _append(self._samples, {"step": step, **sample})

  def close(self) -> None:
    """Flushes and closes the files."""
    self._metrics.close()
    self._samples.close()
    self._board.close()


def _reopen(path: Path, keep: int) -> TextIO:
  """Opens a file of records for appending, without those of later steps."""
  kept = []
  if path.exists():
    with path.open(encoding="utf-8", newline="\n") as file:
      for line in file:
        # A run killed while writing leaves a line without an end.
        if line.endswith("\n") and json.loads(line)["step"] <= keep:
          kept.append(line)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)
  return path.open("a", encoding="utf-8")


def _append(file: TextIO, record: Mapping[str, Any]) -> None:
  file.write(json.dumps(record, allow_nan=False) + "\n")
  file.flush()


def check_finite(values: Mapping[str, float], step: int) -> None:
  """Stops a run that diverged.

  Args:
    values: metrics by name.
    step: that they are of.

  Raises:
    FloatingPointError: a value is NaN or infinite.
  """
  bad = {
    name: float(value)
    for name, value in values.items()
    if not math.isfinite(value)
  }
  if bad:
    listed = ", ".join(f"{name} = {value}" for name, value in bad.items())
    remedy = (
      "look at the data and the checkpoints of student and teacher"
      if step == 1
      else "lower optimizer.learning_rate or optimizer.clip_norm, and resume "
      "from the last checkpoint"
    )
    raise FloatingPointError(f"{listed} at step {step}; {remedy}")


class Progress:
  """A bar with the time left on a terminal, one line per update elsewhere.

  The bar keeps the newest value of each kind; a line has those of its step.
  """

  def __init__(
    self,
    total: int,
    *,
    start: int = 0,
    console: rich.console.Console | None = None,
  ):
    """Starts the clock.

    Args:
      total: steps of the run.
      start: steps done before, by the run that is resumed.
      console: where to write; standard error by default.
    """
    self._console = console or rich.console.Console(stderr=True, markup=False)
    self._total = total
    self._start = start
    self._began = time.monotonic()
    self._shown: dict[str, str] = {}
    self._bar: rich.progress.Progress | None = None
    if self._console.is_terminal:
      self._bar = rich.progress.Progress(
        rich.progress.TextColumn("step"),
        rich.progress.MofNCompleteColumn(),
        rich.progress.BarColumn(bar_width=16),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.description}"),
        console=self._console,
      )
      self._task = self._bar.add_task("", total=total, completed=start)
      self._bar.start()

  def update(self, step: int, values: Mapping[str, float]) -> None:
    """Shows the step reached, and those of the values that are of interest."""
    if step == self._start:
      # What comes before the first step says nothing of the others.
      self._began = time.monotonic()
    new = {
      label: f"{label} {form.format(values[name])}"
      for name, label, form in _SHOWN
      if name in values
    }
    if self._bar is not None:
      self._shown.update(new)
      text = "  ".join(
        self._shown[label] for _, label, _ in _SHOWN if label in self._shown
      )
      self._bar.update(self._task, completed=step, description=text)
      return
    parts = [f"step {step}/{self._total}", *new.values()]
    if step > self._start:
      pace = (time.monotonic() - self._began) / (step - self._start)
      parts.append(f"{round(pace * (self._total - step))} s left")
    self._console.print("  ".join(parts), soft_wrap=True, highlight=False)

  def close(self) -> None:
    """Leaves the bar as it is and gives the terminal back."""
    if self._bar is not None:
      self._bar.stop()
