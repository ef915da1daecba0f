"""What may come between two steps: SIGTERM, and a profiler's trace."""

import contextlib
import signal
from collections.abc import Callable, Iterator
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


@contextlib.contextmanager
def terminated() -> Iterator[Callable[[int], bool]]:
  """Tells, by step, whether the run should stop because SIGTERM came.

  With one process a second SIGTERM ends it at once. Several processes agree on
  the step, whichever of them the signal reached.
  """
  if jax.process_count() > 1:
    yield multihost_utils.reached_preemption_sync_point
    return
  seen = []

  def note(signum: int, frame: Any) -> None:
    seen.append(signum)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

  before = signal.signal(signal.SIGTERM, note)
  try:
    yield lambda step: bool(seen)
  finally:
    signal.signal(signal.SIGTERM, before)
