"""Flags of the commands that draw completions from a model."""

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

# Between two lines of progress.
_SECONDS = 10
_SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p")


def define(values: Any, *, samples: str) -> None:
  """Defines the flags of model, data and sampling.

  Args:
    values: the flags of the command.
    samples: what is drawn if --samples is not given, in words.
  """
  from absl import flags

  options: dict[str, Any] = {"flag_values": values}
  flags.DEFINE_string(
    "model",
    None,
    "checkpoint (DIR or org/name), or DIR of a run or of an adapter",
    **options,
  )
  flags.DEFINE_string(
    "step", "latest", "of a run: latest, best or a step", **options
  )
  flags.DEFINE_string(
    "data",
    None,
    "rows: FILE.jsonl, FILE.parquet, tfds:NAME or a task, such as arith",
    **options,
  )
  flags.DEFINE_string("split", None, "of a task or tfds:NAME", **options)
  flags.DEFINE_integer("rows", None, "first so many rows only", **options)
  flags.DEFINE_boolean(
    "chat", None, "put the prompt into the model's chat template", **options
  )
  flags.DEFINE_string("system", None, "system message, with --chat", **options)
  flags.DEFINE_boolean(
    "thinking", None, "enable_thinking of the chat template", **options
  )
  flags.DEFINE_integer(
    "samples", None, f"completions per prompt (default: {samples})", **options
  )
  flags.DEFINE_integer("max_new_tokens", None, "tokens at most", **options)
  flags.DEFINE_float(
    "temperature", None, "divides the logits; 0 is greedy", **options
  )
  flags.DEFINE_integer("top_k", None, "likeliest k tokens only", **options)
  flags.DEFINE_float("top_p", None, "nucleus of this mass only", **options)
  flags.DEFINE_float("min_p", None, "least share of the top mass", **options)
  flags.DEFINE_integer("seed", None, "of the draws", **options)
  flags.DEFINE_integer(
    "batch", None, "prompts that are completed at the same time", **options
  )
  flags.DEFINE_integer(
    "tensor", 1, "devices to spread the model over", **options
  )
  flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "to compute in", **options
  )


def sampling(values: Any, base: Any) -> Any:
  """A SamplingConfig with what the flags say in place of the base's.

  Raises:
    InputError: a value out of range.
  """
  return replaced("sampling", base, given(values, _SAMPLING))


def source(values: Any, base: Any, prompt: str | None) -> Any:
  """A SourceConfig: of --data, or the base with what the flags say.

  Args:
    values: the flags.
    base: a SourceConfig or None.
    prompt: template of the prompt, if given.

  Returns:
    None if there is neither --data nor a base.

  Raises:
    InputError: a value out of range.
  """
  from opd_jax.config import SourceConfig, TemplateConfig

  if values.data:
    question = TemplateConfig(text="{question}")
    base = SourceConfig(path=values.data, prompt=question)
  if base is None:
    return None
  changes = given(values, ("chat", "system", "thinking"))
  if prompt is not None:
    changes["text"] = prompt
  template = replaced("prompt", base.prompt, changes)
  changes = given(values, ("split", "rows", "answer"))
  return replaced("source", base, {"prompt": template, **changes})


def given(values: Any, names: tuple[str, ...]) -> dict[str, Any]:
  """The flags of these names that were given."""
  return {
    name: values[name].value
    for name in names
    if name in values and values[name].value is not None
  }


def run_sampling(config: Any) -> Any:
  """How a run draws; the default where it does not (`config` may be None)."""
  from opd_jax.config import SamplingConfig

  return getattr(config, "sampling", SamplingConfig())


def dtype(values: Any, config: Any) -> str:
  """--dtype, or that of a run's student, or float32."""
  if values.dtype:
    return values.dtype
  return "float32" if config is None else config.student.compute_dtype


def replaced(name: str, base: Any, changes: Mapping[str, Any]) -> Any:
  """A config with other values, checked; `name` is its group in messages."""
  from opd_jax import parsing

  there = {
    field.name: getattr(base, field.name) for field in dataclasses.fields(base)
  }
  return parsing.parse(type(base), {**there, **changes}, f"{name}.")


def watch(drawn: Iterable[Any], total: int, what: str) -> Iterator[Any]:
  """Passes things on and tells on standard error how far it is.

  A bar on a terminal, else a line now and then.
  """
  import rich.console
  import rich.progress

  console = rich.console.Console(stderr=True, markup=False, highlight=False)
  if console.is_terminal:
    yield from rich.progress.track(
      drawn, description=what, total=total, console=console, transient=True
    )
    return
  began = told = time.monotonic()
  for done, one in enumerate(drawn, start=1):
    yield one
    now = time.monotonic()
    if now - told >= _SECONDS and done < total:
      left = (now - began) * (total - done) / done
      console.print(f"{what} {done}/{total}  {left:.0f} s left")
      told = now
