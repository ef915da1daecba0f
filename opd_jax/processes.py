"""What the processes of a run tell each other on the host.

All processes call every function here but those of complaints. With one process
nothing is sent. What one of them complains about in `exchange` or `from_first`,
all raise. Elsewhere it is to `complain` before it ends, which ends the others.
"""

import contextlib
import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from opd_jax import messages
from opd_jax.errors import InputError

T = TypeVar("T")

# Bytes of one process that are on the way at a time: every device holds those
# of all processes for a moment.
_PIECE = 2**22

# A process that is lost ends the wait earlier.
_MEETING_SECONDS = 3600
_meetings = itertools.count()

# Under what a complaint is kept for all to see.
_COMPLAINT = "opd_jax complaint"


def share(count: int) -> range:
  """The part of `count` things, in order, that is this process's to do."""
  process, processes = jax.process_index(), jax.process_count()
  return range(count * process // processes, count * (process + 1) // processes)


def meet() -> None:
  """Waits for all. Collectives on CPUs wait 30 s only for those behind."""
  client = _client()
  if client is not None:
    name = f"opd_jax {next(_meetings)}"
    client.wait_at_barrier(name, 1000 * _MEETING_SECONDS)


def complain(message: str) -> None:
  """Lets the others know what ends this process; the first one is kept.

  For what is wrong outside of `exchange` and `from_first`.
  """
  client = _client()
  if client is not None:
    index, count = jax.process_index(), jax.process_count()
    line = " ".join(part.strip() for part in message.splitlines())
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      client.key_value_set(
        _COMPLAINT, f"process {index} of {count} ended: {line}"
      )


def complaint() -> str | None:
  """What a process ended with by `complain`, if one did."""
  client = _client()
  if client is None:
    return None
  try:
    return client.key_value_try_get(_COMPLAINT)
  except jax.errors.JaxRuntimeError:
    return None


def _client() -> Any | None:
  """The service that the processes found each other by; None if they did not.

  Its barrier and its store of words work off the devices. What JAX offers in
  public does not, so they are taken from its inside, and in this place alone.
  """
  return distributed.global_state.client


def exchange(make: Callable[[], T]) -> list[T]:
  """What each process makes, in the order of the processes.

  Args:
    make: gives what `messages.pack` takes, or raises InputError.

  Raises:
    InputError: on all processes, that of the first process that raised one.
  """
  if jax.process_count() == 1:
    return [make()]
  return [_opened(told) for told in _gathered(_told(make))]


def from_first(make: Callable[[], T]) -> T:
  """What the first process makes, on all; for what need not be twice alike.

  Args:
    make: as for `exchange`; only the first process calls it.

  Raises:
    InputError: on all processes, that of the first.
  """
  if jax.process_count() == 1:
    return make()
  told = _told(make) if jax.process_index() == 0 else b""
  return _opened(_broadcast(told))


def _told(make: Callable[[], object]) -> bytes:
  try:
    return messages.pack((None, make()))
  except InputError as error:
    return messages.pack((str(error), None))


def _opened(told: bytes) -> T:
  complaint, value = messages.unpack(told)
  if complaint is not None:
    raise InputError(complaint)
  return value


def _broadcast(told: bytes) -> bytes:
  meet()
  size = int(multihost_utils.broadcast_one_to_all(np.uint32(len(told))))
  piece = _padded(told, _room(size))
  return multihost_utils.broadcast_one_to_all(piece).tobytes()[:size]


def _gathered(told: bytes) -> list[bytes]:
  meet()
  sizes = multihost_utils.process_allgather(np.uint32(len(told)))
  parts: list[list[bytes]] = [[] for _ in sizes]
  for start in range(0, int(max(sizes)), _PIECE):
    room = min(_PIECE, _room(int(max(sizes)) - start))
    piece = _padded(told[start : start + room], room)
    for part, found in zip(
      parts, multihost_utils.process_allgather(piece), strict=True
    ):
      part.append(found.tobytes())
  return [
    b"".join(part)[:size] for part, size in zip(parts, sizes, strict=True)
  ]


def _room(size: int) -> int:
  """Powers of two: a program is compiled for each."""
  return max(1024, 1 << (size - 1).bit_length())


def _padded(told: bytes, room: int) -> np.ndarray:
  piece = np.zeros(room, np.uint8)
  piece[: len(told)] = np.frombuffer(told, np.uint8)
  return piece
