"""What became of the rows, and whether evaluation rows are among them."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from opd_jax import templates
from opd_jax.config import RunConfig, SftConfig, SourceConfig
from opd_jax.data import sources
from opd_jax.data.files import Row, read_jsonl
from opd_jax.data.preparing import PromptReport
from opd_jax.models import hf
from opd_jax.preflight.report import Finding, Section, table
from opd_jax.setup import Setup

_SHOWN = 60


def inspect(setup: Setup) -> Section:
  """Counts the rows and looks for evaluation rows among them."""
  config = setup.config
  reports = {**setup.prompts.reports, "all": setup.prompts.report}
  names = [field.name for field in dataclasses.fields(PromptReport)]
  weights = [source.weight for source in config.data.sources.values()]
  shares = [f"{100 * weight / sum(weights):.1f} %" for weight in weights]
  rows = [
    ("source", "share", *(name.replace("_", " ") for name in names)),
    *(
      (name, share, *(_number(getattr(report, field)) for field in names))
      for (name, report), share in zip(
        reports.items(), [*shares, "100 %"], strict=True
      )
    ),
  ]
  if len(weights) == 1:
    rows.pop()
  found = inspect_rows(config)
  return dataclasses.replace(
    found,
    lines=(
      *table(rows),
      f"lengths in ids; data.max_prompt_tokens = "
      f"{config.data.max_prompt_tokens}, data.overlong = "
      f"{config.data.overlong!r}",
      *(
        f"{name}: given completions, written by {origin.model}"
        for name, origin in setup.origins.items()
      ),
      *found.lines,
    ),
    figures={
      "sources": {
        name: dataclasses.asdict(report) for name, report in reports.items()
      },
      **found.figures,
    },
    findings=(*found.findings, *_other_writers(setup)),
  )


def _other_writers(setup: Setup) -> Iterator[Finding]:
  """Stores that the teacher of their rows has not written."""
  config = setup.config
  for name, origin in setup.origins.items():
    teacher = config.domain_teachers.get(name, config.teacher).path
    weights = hf.fingerprint(teacher)
    if origin.weights != weights:
      path = config.data.sources[name].path
      yield Finding(
        name="store_of_another_model",
        message=(
          f"{path} was written by {origin.model} (weights {origin.weights[:12]}"
          f"), and the teacher is {teacher} (weights {weights[:12]}); generate "
          f"it again with --model={teacher}, unless these completions are "
          "meant"
        ),
      )


def inspect_rows(config: RunConfig | SftConfig) -> Section:
  """Looks for evaluation rows among those that are trained on."""
  found = overlaps(config)
  return Section(
    title="data",
    lines=tuple(
      f"{overlap.key}: {overlap.count:,} of {overlap.rows:,} rows are in the "
      "training data too"
      for overlap in found
    ),
    figures={"overlaps": {overlap.key: overlap.count for overlap in found}},
    findings=tuple(_leak(overlap) for overlap in found if overlap.count),
  )


def _number(value: float) -> str:
  return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overlap:
  """Rows of an evaluation that are in the training data.

  Attributes:
    key: of the config, that names the evaluation's rows.
    rows: of the evaluation.
    count: how many of them are in the training data.
    text: the first of them.
    where: it is found in the evaluation.
    trained: the same, in the training data.
  """

  key: str
  rows: int
  count: int
  text: str = ""
  where: str = ""
  trained: str = ""


def overlaps(config: RunConfig | SftConfig) -> list[Overlap]:
  """Compares each evaluation of a run with its training data.

  Two rows are the same if their texts are, or the fields their templates name,
  whatever the case of letters and the white space. Messages are compared as a
  whole and by what the user says: all of it, and in the training data each of
  the user's messages too. A row of a fine-tuning is its prompt, its completion,
  and both together.
  """
  found = []
  for key, rows in _evaluations(config).items():
    seen: dict[str, int] = {}
    for index, (_, keys) in enumerate(rows):
      for text in keys:
        seen.setdefault(text, index)
    # The first place in the training data of each row of the evaluation.
    places: dict[int, str] = {}
    for where, keys in _training(config):
      for text in keys:
        if text in seen:
          places.setdefault(seen[text], where)
    overlap = Overlap(key=key, rows=len(rows), count=len(places))
    if places:
      first = min(places)
      where, keys = rows[first]
      overlap = dataclasses.replace(
        overlap, text=keys[0], where=where, trained=places[first]
      )
    found.append(overlap)
  return found


def _leak(overlap: Overlap) -> Finding:
  return Finding(
    name="eval_rows_in_training",
    message=(
      f"{overlap.count:,} of {overlap.rows:,} rows of {overlap.key} are in the "
      f"training data: {overlap.where} is {overlap.trained}: "
      f"{overlap.text[:_SHOWN]!r}; take them out of one of the two, or the "
      "result will look better than it is"
    ),
  )


Keyed = tuple[str, tuple[str, ...]]


def _training(config: RunConfig | SftConfig) -> Iterator[Keyed]:
  """Where each row is, and its texts for comparison."""
  learned = isinstance(config, SftConfig)
  for source in config.data.sources.values():
    for where, row in _rows(source):
      keys = _prompt_keys(source, row, where, each=True)
      if learned:
        keys += _learned_keys(source, row, where)
      yield where, keys


def _evaluations(config: RunConfig | SftConfig) -> dict[str, list[Keyed]]:
  found: dict[str, list[Keyed]] = {}
  if config.eval.source is not None:
    source = config.eval.source
    found["eval.source"] = [
      (where, _prompt_keys(source, row, where, each=False))
      for where, row in _rows(source)
    ]
  held_out = config.held_out
  if held_out.path is not None:
    rows = read_jsonl(held_out.path)[: held_out.rows]
    found["held_out"] = []
    for number, row in enumerate(rows, start=1):
      where = f"{held_out.path}, line {number}"
      found["held_out"].append((where, _keys(held_out.text, row, where)))
  return found


def _rows(source: SourceConfig) -> Iterator[tuple[str, Row]]:
  for index, row in enumerate(sources.read(source)):
    yield sources.where(source, index), row


def _prompt_keys(
  source: SourceConfig, row: Row, where: str, *, each: bool
) -> tuple[str, ...]:
  """Texts of a prompt; `each`: of every message of the user too."""
  config = source.prompt
  if config.messages is None:
    return _keys(config.text, row, where)
  # `templates.prompt` has refused rows whose messages are none.
  messages = row[config.messages]
  said = [part["content"] for part in messages if part["role"] == "user"]
  texts = [_all_messages(source, row), "\n".join(said)]
  if each:
    texts += said
  # Without a text, as where the user says nothing, all rows were alike.
  return tuple(filter(None, dict.fromkeys(map(_normalised, texts))))


def _learned_keys(
  source: SourceConfig, row: Row, where: str
) -> tuple[str, ...]:
  """Texts of a completion, alone and behind its prompt."""
  alone = _keys(source.completion, row, where)
  if source.prompt.messages is None:
    return alone + _keys(source.prompt.text + source.completion, row, where)
  completion = templates.fill(source.completion, row, where)
  whole = f"{_all_messages(source, row)}\n{completion}"
  return (*alone, _normalised(whole))


def _all_messages(source: SourceConfig, row: Row) -> str:
  parts = row[source.prompt.messages or ""]
  return "\n".join(part["content"] for part in parts)


def _keys(template: str, row: Mapping[str, Any], where: str) -> tuple[str, ...]:
  """The text of a row, and its fields alone, for comparison."""
  bare = " ".join(
    f"{{{field}}}" for field in dict.fromkeys(templates.fields(template))
  )
  return tuple(
    dict.fromkeys(
      _normalised(templates.fill(form, row, where)) for form in (template, bare)
    )
  )


def _normalised(text: str) -> str:
  return " ".join(text.split()).casefold()
