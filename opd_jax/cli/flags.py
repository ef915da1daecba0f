"""Flags of a command: parsed, described, and checked before any work."""

import contextlib
import json
import os
import tempfile
import textwrap
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd_jax.errors import InputError


def new() -> Any:
  """An empty set of flags, on which a command defines its own."""
  from absl import flags

  return flags.FlagValues()


def parse(
  values: Any,
  command: str,
  arguments: Sequence[str],
  *,
  required: Sequence[str],
) -> bool:
  """Parses the flags of a command; false if only help was asked for."""
  from absl import flags

  if any(argument in ("-h", "--help") for argument in arguments):
    needed = " ".join(f"--{name}=..." for name in required)
    print(f"usage: opd-jax {command} {needed} [--flag=value ...]\n")
    names = [*required, *(name for name in values if name not in required)]
    print("\n".join(_describe(values[name]) for name in names))
    return False
  try:
    rest = values([command, *arguments])[1:]
  except flags.Error as error:
    raise InputError(f"{command}: {error}") from error
  if rest:
    raise InputError(
      f"{command}: unexpected argument {rest[0]!r}; write --flag=value"
    )
  missing = [f"--{name}" for name in required if not values[name].value]
  if missing:
    raise InputError(
      f"{command} needs {' and '.join(missing)}; see opd-jax {command} --help"
    )
  return True


def define_config(values: Any) -> None:
  """Defines --config; its keys go to `split_overrides`."""
  from absl import flags

  flags.DEFINE_string(
    "config",
    None,
    "experiment: FILE.py, or FILE.py:ARG for get_config(ARG); "
    "--config.KEY=VALUE sets one of its keys, such as "
    "--config.optimizer.learning_rate=1e-5",
    flag_values=values,
  )


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
  """KEY=VALUE of each "--config.KEY=VALUE", and the other arguments."""
  prefix = "--config."
  return (
    [a.removeprefix(prefix) for a in arguments if a.startswith(prefix)],
    [a for a in arguments if not a.startswith(prefix)],
  )


def _describe(flag: Any) -> str:
  """The lines of a flag in the help of its command."""
  text = flag.help
  if flag.default is not None and flag.default is not False:
    text += f" (default: {flag.default})"
  indent = 20
  return textwrap.fill(
    f"  --{flag.name}".ljust(indent) + " ".join(text.split()),
    width=79,
    subsequent_indent=" " * indent,
    break_long_words=False,
    break_on_hyphens=False,
  )


def check_folder(flag: str, path: str, *, bucket: bool = False) -> None:
  """Raises unless a folder is there or can be made, and can be written to.

  It is tried, and nothing is left of the trial.

  Args:
    flag: for messages.
    path: of the folder.
    bucket: it may be one of a bucket.
  """
  from opd_jax import storage

  if storage.is_remote(path):
    if not bucket:
      raise InputError(
        f"{flag}={path}: this cannot be in a bucket; name a folder"
      )
    _check_bucket(flag, path)
    return
  folder = Path(path).absolute()
  missing = []
  there = folder
  # Unlike Path.exists this takes what may not be looked into as missing.
  while not os.path.exists(there):
    missing.append(there)
    there = there.parent
  if not there.is_dir():
    raise InputError(
      f"{flag}={path} cannot be a folder: {there} is a file; name another path"
    )
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
      pass
  except OSError as error:
    raise InputError(
      f"{flag}={path}: cannot write in {there} ({error.strerror}); name "
      "another path"
    ) from error
  finally:
    with contextlib.suppress(OSError):
      for made in missing:
        made.rmdir()


def _check_bucket(flag: str, path: str) -> None:
  from opd_jax import storage

  folder = storage.to_path(path)
  trial = folder / f".trial-{uuid.uuid4().hex}"
  try:
    folder.mkdir(parents=True, exist_ok=True)
    trial.write_text("")
    trial.unlink()
  except OSError as error:
    raise InputError(
      f"{flag}={path}: cannot write there ({error}); see that the bucket "
      "exists and that this machine may write to it"
    ) from error


def check_file(flag: str, path: str) -> None:
  """Raises unless a file is there, or could be written."""
  if Path(path).is_dir():
    raise InputError(f"{flag}={path} is a folder; name a file to write")
  check_folder(flag, str(Path(path).parent))


def write(path: str, values: Any) -> None:
  """Writes figures as JSON; see --json of the commands."""
  Path(path).parent.mkdir(parents=True, exist_ok=True)
  Path(path).write_text(json.dumps(values, indent=2) + "\n")
