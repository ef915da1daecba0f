"""The command line: `opd-jax COMMAND --flag=value ...`.

A user's mistake ends with one line on standard error and status 2, before any
device work. Heavy imports wait until a command needs them.
"""

import importlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from opd_jax.errors import InputError

USAGE = """usage: opd-jax COMMAND [--flag=value ...]

  train     --config=FILE.py[:ARG] --workdir=DIR [--config.KEY=VALUE ...]
            distil a student; run again to resume
  sft       --config=FILE.py[:ARG] --workdir=DIR [--config.KEY=VALUE ...]
            fine-tune on given completions; run again to resume
  eval      --model=DIR [--data=FILE --verifier=number --samples=8 ...]
            how often a checkpoint or a run is right, with intervals
  plan      --config=FILE.py[:ARG] [--topology=v5p:4x4x4 ...]
            whether a run fits devices that are not there
  preflight --config=FILE.py[:ARG] [--config.KEY=VALUE ...]
            look for what may be wrong with a run before it starts
  generate  --model=DIR --prompt=TEXT [--prompt=TEXT ...]
            complete prompts, or with --data and --out all rows of a source
  export    --workdir=DIR --out=DIR [--step=latest|best|N]
            write a checkpoint of a run as a Hugging Face model
  dataset   --jsonl=FILE --name=NAME --data_dir=DIR [--split=train]
            make a TensorFlow Dataset of a JSONL file

opd-jax COMMAND --help lists the flags of a command.
"""

COMMANDS = (
  "train",
  "sft",
  "eval",
  "plan",
  "preflight",
  "generate",
  "export",
  "dataset",
)


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs a command; returns the exit status."""
  arguments = list(sys.argv[1:] if arguments is None else arguments)
  if not arguments or arguments[0] in ("-h", "--help", "help"):
    print(USAGE, end="")
    return 0
  name, *rest = arguments
  if name not in COMMANDS:
    return _complain(f"unknown command {name!r}; known: {', '.join(COMMANDS)}")
  _default_compilation_cache()
  try:
    return importlib.import_module(f"opd_jax.cli.{name}").run(rest)
  except InputError as error:
    return _complain(str(error))
  except FloatingPointError as error:
    _complain(str(error))
    return 1
  except BrokenPipeError:
    # Who reads the output has seen enough: `opd-jax eval ... | head`.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
  except KeyboardInterrupt:
    print("opd-jax: interrupted", file=sys.stderr)
    return 128 + signal.SIGINT


def _default_compilation_cache() -> None:
  """Compiled programs are kept between runs unless the user says otherwise."""
  cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
  os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(cache) / "opd_jax" / "xla")
  )


def _complain(message: str) -> int:
  line = " ".join(part.strip() for part in message.splitlines())
  print(f"opd-jax: error: {line}", file=sys.stderr)
  return 2
