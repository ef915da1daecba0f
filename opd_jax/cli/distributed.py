"""One process of many: finds the others, and ends if one of them is lost."""

import contextlib
import os
import re
import sys
import threading
import time
import traceback
from typing import Any

from opd_jax.errors import InputError

# Without a sign of life for so many seconds a process counts as lost.
HEARTBEAT_SECONDS = 60

# The first process, which serves the heartbeats, lets the others end first.
_LAST_SECONDS = 3

# Between two looks at whether another process complains.
_LOOK_SECONDS = 1

# How the runtime speaks of a process that is gone.
_LOST = re.compile(
  "gloo|nccl|heartbeat|coordination service|unavailable:", re.IGNORECASE
)


def define(values: Any) -> None:
  """Defines the flags that make a command one process of many."""
  from absl import flags

  options: dict[str, Any] = {"flag_values": values}
  flags.DEFINE_boolean(
    "distributed",
    False,
    "this is one process of many, which a TPU slice, GKE, SLURM or MPI tells "
    "of each other",
    **options,
  )
  flags.DEFINE_string(
    "coordinator",
    None,
    "HOST:PORT of the first process, where nothing else tells it; any free "
    "port will do",
    **options,
  )
  flags.DEFINE_integer(
    "processes", None, "how many there are; with --coordinator", **options
  )
  flags.DEFINE_integer(
    "process_id", None, "which of them this is, from 0", **options
  )
  flags.DEFINE_integer(
    "heartbeat",
    HEARTBEAT_SECONDS,
    "seconds without a sign of life after which a process counts as lost and "
    "the others end",
    lower_bound=1,
    **options,
  )


class Joined(contextlib.AbstractContextManager):
  """Within it this is one process of many, if the flags say so.

  Bad input passes, and ends the others too, wherever they are: those that do
  not come upon it themselves within half of `--heartbeat` tell it and exit with
  status 2. A metric that is not finite passes: it is so on all. Any other error
  ends this process at once, without waiting for the others: they notice.
  """

  def __init__(self, values: Any):
    """Finds the others.

    Raises:
      InputError: the flags do not say who they are, or they do not answer.
    """
    named = {
      name: values[name].value
      for name in ("coordinator", "processes", "process_id")
    }
    missing = [name for name, value in named.items() if value is None]
    self._joined = values.distributed or len(missing) < len(named)
    if not self._joined:
      return
    if 0 < len(missing) < len(named):
      raise InputError(
        f"--{', --'.join(n for n in named if n not in missing)} without "
        f"--{', --'.join(missing)}; give all three, or --distributed alone "
        "where a cluster tells them"
      )
    import jax

    try:
      jax.distributed.initialize(
        coordinator_address=named["coordinator"],
        num_processes=named["processes"],
        process_id=named["process_id"],
        heartbeat_timeout_seconds=values.heartbeat,
        shutdown_timeout_seconds=values.heartbeat,
      )
    except (ValueError, RuntimeError) as error:
      raise InputError(
        f"the processes of this run do not find each other: {error}; see that "
        "all were started, or name them by --coordinator=HOST:PORT, "
        "--processes=N and --process_id=I"
      ) from error
    # The one that complains waits for the others as long as `--heartbeat`.
    self._grace = values.heartbeat / 2
    self._ended = threading.Event()
    self._listener = threading.Thread(target=self._listen, daemon=True)
    self._listener.start()

  def _listen(self) -> None:
    """Ends this process if another one complains, and this one does not."""
    import jax

    from opd_jax import processes

    while not self._ended.wait(_LOOK_SECONDS):
      complaint = processes.complaint()
      if complaint is None:
        continue
      if self._ended.wait(self._grace):
        return
      print(f"opd-jax: error: {complaint}", file=sys.stderr, flush=True)
      with contextlib.suppress(RuntimeError):
        jax.distributed.shutdown()  # Waits for the others.
      os._exit(2)

  def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
    if not self._joined:
      return
    self._ended.set()
    self._listener.join()
    if not isinstance(error, Exception):
      return
    if isinstance(error, InputError):
      from opd_jax import processes

      processes.complain(str(error))
    if isinstance(error, InputError | FloatingPointError):
      return
    import jax

    traceback.print_exception(error)
    if is_loss(error, jax.process_count()):
      first = str(error).partition("\n")[0]
      print(
        f"opd-jax: error: process {jax.process_index()} of "
        f"{jax.process_count()} lost another one ({first}); see the output of "
        "that one, and start all again: the same command resumes after the "
        "last checkpoint",
        file=sys.stderr,
      )
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
      # The others are aborted, with a stack trace, where it goes before them.
      time.sleep(_LAST_SECONDS)
    os._exit(1)


def is_loss(error: Exception, count: int) -> bool:
  """Whether one of `count` processes failed because another one is gone.

  What JAX raises alone says so: a bucket, too, may be "unavailable".
  """
  import jax

  told_by_jax = isinstance(error, jax.errors.JaxRuntimeError)
  return told_by_jax and count > 1 and _LOST.search(str(error)) is not None
