"""The command line: `opd-jax COMMAND --flag=value ...`.

A user's mistake ends with one line on standard error and status 2, before any
device work. Heavy imports wait until a command needs them.
"""

import json
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from opd_jax.errors import InputError

USAGE = """usage: opd-jax COMMAND [--flag=value ...]

  train     --config=FILE.py[:ARG] --workdir=DIR [--config.KEY=VALUE ...]
            distil a student; run again to resume
  generate  --model=DIR --prompt=TEXT [--prompt=TEXT ...]
            complete prompts
  export    --workdir=DIR --out=DIR [--step=latest|best|N]
            write a checkpoint of a run as a Hugging Face model

opd-jax COMMAND --help lists the flags of a command.
"""


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs a command; returns the exit status."""
  arguments = list(sys.argv[1:] if arguments is None else arguments)
  if not arguments or arguments[0] in ("-h", "--help", "help"):
    print(USAGE, end="")
    return 0
  name, *rest = arguments
  if name not in _COMMANDS:
    return _complain(f"unknown command {name!r}; known: {', '.join(_COMMANDS)}")
  _default_compilation_cache()
  try:
    return _COMMANDS[name](rest)
  except InputError as error:
    return _complain(str(error))
  except FloatingPointError as error:
    _complain(str(error))
    return 1
  except KeyboardInterrupt:
    print("opd-jax: interrupted", file=sys.stderr)
    return 128 + signal.SIGINT


def _train(arguments: Sequence[str]) -> int:
  from absl import flags

  values = flags.FlagValues()
  options: dict[str, Any] = {"flag_values": values}
  flags.DEFINE_string(
    "config",
    None,
    "experiment: FILE.py, or FILE.py:ARG for get_config(ARG); "
    "--config.KEY=VALUE sets one of its keys, such as "
    "--config.optimizer.learning_rate=1e-5",
    **options,
  )
  flags.DEFINE_string(
    "workdir",
    None,
    "folder of the run; a run begun there is resumed",
    **options,
  )
  flags.DEFINE_boolean(
    "distributed",
    False,
    "this is one process of many: find the others with jax.distributed",
    **options,
  )
  overrides = [a for a in arguments if a.startswith("--config.")]
  others = [a for a in arguments if a not in overrides]
  if not _parse(values, "train", others, required=("config", "workdir")):
    return 0
  _check_folder("--workdir", values.workdir)
  from opd_jax import parsing

  config = parsing.load(
    values.config,
    [override.removeprefix("--config.") for override in overrides],
  )
  import jax

  if values.distributed:
    jax.distributed.initialize()
  from opd_jax import train

  summary = train.train(config, values.workdir)
  if jax.process_index() == 0:
    _report(summary, config.steps)
  return 0 if summary.finished else 128 + signal.SIGTERM


def _generate(arguments: Sequence[str]) -> int:
  from absl import flags

  values = flags.FlagValues()
  options: dict[str, Any] = {"flag_values": values}
  flags.DEFINE_string("model", None, "checkpoint: DIR or org/name", **options)
  flags.DEFINE_multi_string("prompt", None, "text to complete", **options)
  flags.DEFINE_integer("max_new_tokens", 128, "tokens at most", **options)
  flags.DEFINE_float(
    "temperature", 1.0, "divides the logits; 0 is greedy", **options
  )
  flags.DEFINE_integer("top_k", None, "likeliest k tokens only", **options)
  flags.DEFINE_float("top_p", None, "nucleus of this mass only", **options)
  flags.DEFINE_float("min_p", None, "least share of the top mass", **options)
  flags.DEFINE_integer("samples", 1, "completions per prompt", **options)
  flags.DEFINE_integer("seed", 0, "of the draws", **options)
  flags.DEFINE_integer("tensor", 1, "devices to spread over", **options)
  flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "to compute in", **options
  )
  flags.DEFINE_string(
    "json", None, "file to write tokens and logprobs to", **options
  )
  if not _parse(values, "generate", arguments, required=("model", "prompt")):
    return 0
  from opd_jax import parsing
  from opd_jax.config import SamplingConfig

  names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p")
  sampling = parsing.parse(
    SamplingConfig, {name: values[name].value for name in names}
  )
  if values.samples < 1:
    raise InputError(f"--samples must be >= 1, got {values.samples}")
  if values.json:
    _check_file("--json", values.json)
  from opd_jax import generate

  completions = generate.generate(
    values.model,
    values.prompt,
    sampling,
    samples=values.samples,
    seed=values.seed,
    compute_dtype=values.dtype,
    tensor=values.tensor,
  )
  for completion in completions:
    print(f"{completion.prompt}{completion.text}")
  if values.json:
    _write(values.json, [vars(completion) for completion in completions])
  return 0


def _export(arguments: Sequence[str]) -> int:
  from absl import flags

  values = flags.FlagValues()
  options: dict[str, Any] = {"flag_values": values}
  flags.DEFINE_string("workdir", None, "folder of the run", **options)
  flags.DEFINE_string(
    "out", None, "folder to write; must not exist, or be empty", **options
  )
  flags.DEFINE_string("step", "latest", "latest, best or a step", **options)
  flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "of the weights", **options
  )
  if not _parse(values, "export", arguments, required=("workdir", "out")):
    return 0
  _check_folder("--out", values.out)
  # The accelerators stay free for a run that may be using them.
  os.environ["JAX_PLATFORMS"] = "cpu"
  from opd_jax import run_export

  step = run_export.export_run(
    values.workdir, values.out, step=values.step, dtype=values.dtype
  )
  print(f"wrote step {step} to {values.out}")
  return 0


_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
  "train": _train,
  "generate": _generate,
  "export": _export,
}


def _parse(
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
    print("\n".join(_describe(values[name]) for name in values))
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


def _check_folder(flag: str, path: str) -> None:
  """Raises unless a folder is there, or could be made."""
  if "://" in path:
    raise InputError(
      f"{flag}={path}: buckets are not supported; name a folder, on a disk "
      "that all hosts share if there are several"
    )
  there = Path(path).absolute()
  while not there.exists():
    there = there.parent
  if not there.is_dir():
    raise InputError(
      f"{flag}={path} cannot be a folder: {there} is a file; name another path"
    )
  if not os.access(there, os.W_OK):
    raise InputError(
      f"{flag}={path}: no permission to write in {there}; name another path"
    )


def _check_file(flag: str, path: str) -> None:
  """Raises unless a file is there, or could be written."""
  if Path(path).is_dir():
    raise InputError(f"{flag}={path} is a folder; name a file to write")
  _check_folder(flag, str(Path(path).parent))


def _default_compilation_cache() -> None:
  """Compiled programs are kept between runs unless the user says otherwise."""
  cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
  os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(cache) / "opd_jax" / "xla")
  )


def _report(summary: Any, steps: int) -> None:
  if not summary.finished:
    print(
      f"stopped after step {summary.step} of {steps}; the same command resumes",
      file=sys.stderr,
    )
    return
  if summary.loss_before is not None:
    print(
      f"held-out loss {summary.loss_before:.4f} -> {summary.loss_after:.4f} "
      "nats per token"
    )
  print(
    f"{summary.step} steps in {summary.seconds:.0f} s, "
    f"{summary.compile_seconds:.0f} s of them compiling"
  )
  print(f"Hugging Face checkpoint: {summary.export}")


def _write(path: str, values: Any) -> None:
  Path(path).parent.mkdir(parents=True, exist_ok=True)
  Path(path).write_text(json.dumps(values, indent=2) + "\n")


def _complain(message: str) -> int:
  line = " ".join(part.strip() for part in message.splitlines())
  print(f"opd-jax: error: {line}", file=sys.stderr)
  return 2


if __name__ == "__main__":
  sys.exit(main())
