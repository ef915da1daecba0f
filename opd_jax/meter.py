"""Metrics and seconds between two records of the log.

The device runs ahead of the host: metrics of a step are fetched when the record
is closed, and the time is that of all its steps together.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np

from opd_jax import chips
from opd_jax.metrics import check_finite


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """What a step did.

  Attributes:
    tokens: that it made, or learned from.
    operations: floating-point operations on real (not padded) tokens.
  """

  tokens: float
  operations: float


# Of drawn tokens alone: NaN says that a step has none, see `update`.
_OF_DRAWN = ("teacher/kl", "mismatch/", "drift/")


class Meter:
  """Metrics and seconds since the last record; the device runs ahead."""

  def __init__(self, work: Callable[[Mapping[str, float]], Work]):
    """Starts the clock.

    Args:
      work: of a step, from the means of its metrics.
    """
    self._work = work
    self._metrics: list[Mapping[str, jax.Array]] = []
    self._began = time.monotonic()
    self.split: Mapping[str, float] = {}

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """What happens inside is not part of the steps' time."""
    jax.block_until_ready(self._metrics)
    start = time.monotonic()
    yield
    self._began += time.monotonic() - start

  def add(self, metrics: Mapping[str, jax.Array]) -> None:
    """Notes a step, without waiting for it."""
    self._metrics.append(metrics)

  def check(self, step: int) -> None:
    """Raises FloatingPointError if a step up to this one has diverged."""
    fetched = self._fetched()
    for index, values in enumerate(fetched, start=step - len(fetched) + 1):
      check_finite(values, index)

  @property
  def steps(self) -> int:
    """Steps since the last record."""
    return len(self._metrics)

  def close(self, step: int) -> dict[str, float]:
    """The record of the steps since the last one; starts the next one.

    Means over the steps that have a value; `/max` and `length_max` are maxima.
    """
    self.check(step)
    fetched = self._fetched()
    seconds = (time.monotonic() - self._began) / len(fetched)
    record = {
      name: float(
        (np.max if name.endswith("max") else np.mean)(
          [values[name] for values in fetched if name in values]
        )
      )
      for name in self._metrics[0]
      if any(name in values for values in fetched)
    }
    record["time/step"] = seconds
    work = self._work(record)
    record["train/tokens_per_second"] = work.tokens / seconds
    if self.split:
      record |= self.split
      rest = seconds - sum(self.split.values())
      record["time/update"] = max(rest, 0.0)
    record |= _utilisation(work.operations / seconds / jax.device_count())
    self._metrics = []
    self._began = time.monotonic()
    return record

  def _fetched(self) -> list[dict[str, float]]:
    """Values by step, without those of drawn tokens where there are none."""
    return [
      {
        name: value
        for name, value in values.items()
        if not (name.startswith(_OF_DRAWN) and np.isnan(value))
      }
      for values in jax.device_get(self._metrics)
    ]


def _utilisation(rate: float) -> dict[str, float]:
  """How busy a device is, from its operations per second, and its memory."""
  found = {"train/tflops_per_device": rate / 1e12}
  device = jax.local_devices()[0]
  chip = chips.find(device.device_kind)
  if chip is not None:
    found["train/mfu"] = rate / chip.flops
  memory = device.memory_stats() or {}
  if "peak_bytes_in_use" in memory:
    found["memory/peak_gib"] = memory["peak_bytes_in_use"] / 2**30
  return found
