"""One process of many: finds the others, and ends if one of them is lost."""

import contextlib
import os
import re
import sys
import time
import traceback
from typing import Any

from opd_jax.errors import InputError

# Without a sign of life for so many seconds a process counts as lost.
HEARTBEAT_SECONDS = 60

# The first process, which serves the heartbeats, lets the others end first.
_LAST_SECONDS = 3

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

  What ends all of them alike, such as bad input, passes. Any other error ends
  this process at once, without waiting for the others: they notice.
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

  def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
    alike = InputError | FloatingPointError
    if not self._joined or not isinstance(error, Exception):
      return
    if isinstance(error, alike):
      return
    import jax

    if _LOST.search(str(error)):
      first = str(error).partition("\n")[0]
      print(
        f"opd-jax: error: process {jax.process_index()} of "
        f"{jax.process_count()} lost another one ({first}); see the output of "
        "that one, and start all again: the same command resumes after the "
        "last checkpoint",
        file=sys.stderr,
      )
    else:
      traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
      # The others are aborted, with a stack trace, where it goes before them.
      time.sleep(_LAST_SECONDS)
    os._exit(1)
