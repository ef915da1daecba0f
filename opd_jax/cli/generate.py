"""`opd-jax generate`: complete prompts, or all rows of a source."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from opd_jax.cli import drawing
from opd_jax.cli.flags import check_file, new, parse, write
from opd_jax.errors import InputError

_BATCH = 64
# Keys of a line of --out that are never fields of the source.
_OWN = ("completion", "stopped", "logprob")

Row = Mapping[str, Any]


def run(arguments: Sequence[str]) -> int:
  """Runs the command; returns the exit status."""
  values = _flags()
  if not parse(values, "generate", arguments, required=("model",)):
    return 0
  _check(values)
  from opd_jax import generate, saved, templates
  from opd_jax.data import store
  from opd_jax.generate import Generator

  found = saved.find(values.model, values.step)
  stored = bool(values.out) and Path(values.out).suffix == store.SUFFIX
  weights = found.fingerprint() if stored else ""
  tokenizer = found.tokenizer()
  if values.data:
    rows, prompts, names = _rows(values, tokenizer)
    if stored:
      rows = [
        {**row, "prompt_ids": prompt.ids}
        for row, prompt in zip(rows, prompts, strict=True)
      ]
  else:
    rows = []
    prompts = [
      templates.Prompt(text=text, ids=tuple(tokenizer.encode(text)))
      for text in values.prompt
    ]
    names = [f"prompt {text[:40]!r}" for text in values.prompt]
  prepared = generate.prepare(
    prompts,
    names,
    tokenizer,
    found.architecture,
    drawing.sampling(values, drawing.run_sampling(found.config)),
    samples=1 if values.samples is None else values.samples,
    seed=values.seed or 0,
    batch=values.batch or _BATCH,
  )
  model = found.decoder(
    drawing.dtype(values, found.config),
    values.tensor,
    min(len(prompts), prepared.batch),
  )
  drawn = Generator(prepared, model)(found.load(model))
  if values.data:
    drawn = drawing.watch(drawn, len(prompts), "prompts")
    done = _completed(rows, drawn, values.stopped_only)
    if stored:
      origin = store.Origin(
        model=found.source,
        weights=weights,
        tokenizer=tokenizer.fingerprint(),
        sampling={
          **dataclasses.asdict(prepared.sampling),
          "stop_ids": list(prepared.stop_ids),
        },
        seed=prepared.seed,
        samples=prepared.samples,
      )
      _write_store(values.out, rows, done, origin)
    else:
      _write_rows(values.out, (_line(row, one) for row, one in done))
    return 0
  completions = [one for group in drawn for one in group]
  for completion in completions:
    print(f"{completion.prompt}{completion.text}")
  if values.json:
    write(values.json, [vars(completion) for completion in completions])
  return 0


def _flags() -> Any:
  from absl import flags

  values = new()
  options: dict[str, Any] = {"flag_values": values}
  drawing.define(values, samples="1")
  flags.DEFINE_multi_string(
    "prompt",
    None,
    "text to complete; with --data one template: {question}",
    **options,
  )
  flags.DEFINE_string(
    "json", None, "file to write tokens and logprobs to", **options
  )
  flags.DEFINE_string(
    "out",
    None,
    "with --data: file to write, a completion a line; FILE.parquet keeps ids",
    **options,
  )
  flags.DEFINE_boolean(
    "stopped_only", False, "leave out completions cut at the limit", **options
  )
  return values


def _check(values: Any) -> None:
  if not values.data and not values.prompt:
    raise InputError(
      "generate needs --prompt=TEXT, or --data=FILE and --out=FILE; see "
      "opd-jax generate --help"
    )
  for flag, other, wrong in (
    ("--data", "--out", bool(values.data) and not values.out),
    ("--out", "--data", bool(values.out) and not values.data),
  ):
    if wrong:
      raise InputError(f"generate: {flag} needs {other} too")
  if values.data and len(values.prompt or ()) > 1:
    raise InputError(
      "generate: with --data there is one --prompt, the template of all rows, "
      f"got {len(values.prompt)}"
    )
  for name in ("json", "out"):
    if values[name].value:
      check_file(f"--{name}", values[name].value)
  for name in ("samples", "batch"):
    value = values[name].value
    if value is not None and value < 1:
      raise InputError(f"--{name} must be >= 1, got {value}")


def _rows(values: Any, tokenizer: Any) -> tuple[list[Any], ...]:
  """The rows of --data, their prompts, and names of these."""
  from opd_jax import templates
  from opd_jax.data import sources, store

  (template,) = values.prompt or (None,)
  source = drawing.source(values, None, template)
  rows = sources.read(source)
  names = [sources.where(source, index) for index in range(len(rows))]
  own = store.OWN if Path(values.out).suffix == store.SUFFIX else _OWN
  for row, name in zip(rows, names, strict=True):
    _check_fields(row, name, own)
  prompts = [
    templates.prompt(source.prompt, row, tokenizer, name)
    for row, name in zip(rows, names, strict=True)
  ]
  return rows, prompts, [f"the prompt of {name}" for name in names]


def _check_fields(row: Row, where: str, own: Sequence[str]) -> None:
  """Raises InputError unless a row can be written beside a completion."""
  for field, value in row.items():
    if field in own:
      raise InputError(
        f"{where}: field {field!r} would be overwritten in --out, which has "
        f"{', '.join(own)} of its own; rename the field in the data"
      )
    try:
      json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
      raise InputError(
        f"{where}: field {field!r} cannot be written to --out as JSON "
        f"({error}), got {value!r:.80}; make it valid text, or leave the field "
        "out of the data"
      ) from error


def _completed(
  rows: Sequence[Row], drawn: Any, stopped_only: bool
) -> Iterator[tuple[Row, Any]]:
  """Each row with each of its completions."""
  for row, completions in zip(rows, drawn, strict=True):
    for one in completions:
      if one.stopped or not stopped_only:
        yield row, one


def _write_store(
  path: str,
  rows: Sequence[Row],
  completed: Iterator[tuple[Row, Any]],
  origin: Any,
) -> None:
  """A Parquet file of ids, with the model that wrote them."""
  from opd_jax.data import store

  stored = (
    {
      "prompt": one.prompt,
      **row,
      "completion": one.text,
      "completion_ids": one.tokens,
      "logprobs": one.logprobs,
      "stopped": one.stopped,
    }
    for row, one in completed
  )
  count = store.write(path, rows, stored, origin)
  print(f"wrote {count} completions to {path}")


def _line(row: Row, one: Any) -> Row:
  return {
    "prompt": one.prompt,
    **row,
    "completion": one.text,
    "stopped": one.stopped,
    "logprob": sum(one.logprobs),
  }


def _write_rows(path: str, rows: Iterator[Row]) -> None:
  """One object a line; the file appears when it is complete."""
  Path(path).parent.mkdir(parents=True, exist_ok=True)
  partial = Path(f"{path}.partial")
  count = 0
  try:
    with partial.open("w", encoding="utf-8") as file:
      for row in rows:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        count += 1
    partial.replace(path)
  finally:
    partial.unlink(missing_ok=True)
  print(f"wrote {count} completions to {path}")
