"""What may come between two steps: a signal, and a profiler's trace."""

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from opd_jax.types import TrainState


class Profiler(contextlib.AbstractContextManager):
  """Traces the steps first .. last into a folder, if there are any to trace."""

  def __init__(self, steps: tuple[int, ...] | None, folder: Path):
    self._steps = steps
    self._folder = folder
    self._running = False

  def before(self, step: int, state: TrainState) -> None:
    """Starts or ends the trace between the step before and this one."""
    if self._steps is None or step not in (self._steps[0], self._steps[1] + 1):
      return
    jax.block_until_ready(state)
    if step == self._steps[0]:
      jax.profiler.start_trace(str(self._folder))
      self._running = True
    else:
      self._stop()

  def _stop(self) -> None:
    if self._running:
      jax.profiler.stop_trace()
      self._running = False

  def __exit__(self, *error: object) -> None:
    self._stop()


class Interrupts(contextlib.AbstractContextManager):
  """Notes SIGTERM and Ctrl-C, so that a run may save before it ends.

  With one process a second one ends it at once. Several processes agree on the
  step after a SIGTERM, whichever of them it reached; Ctrl-C ends them at once.

  Attributes:
    signal: that came, if one did.
  """

  def __init__(self):
    self.signal: int | None = None
    self._before: dict[int, Any] = {}

  def __enter__(self) -> "Interrupts":
    if jax.process_count() == 1:
      for number in (signal.SIGTERM, signal.SIGINT):
        self._before[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *error: object) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def stop(self, step: int) -> bool:
    """Whether the run should end before this step; all processes agree."""
    if (
      jax.process_count() > 1
      and multihost_utils.reached_preemption_sync_point(step)
    ):
      self.signal = signal.SIGTERM
    return self.signal is not None

  def _note(self, number: int, frame: Any) -> None:
    self.signal = number
    for noted, handler in self._before.items():
      signal.signal(noted, handler)
    # Not by a console: the signal may have come while one was writing.
    told = b"\nfinishing the step, then saving; again to abandon\n"
    os.write(sys.stderr.fileno(), told)
