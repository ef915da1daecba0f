"""The prompts of student and teacher, rendered side by side."""

import dataclasses
import itertools
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from opd_jax import templates
from opd_jax.config import SourceConfig, TemplateConfig
from opd_jax.data import sources
from opd_jax.preflight.report import Finding, Section, table
from opd_jax.setup import Setup
from opd_jax.templates import Prompt
from opd_jax.tokenizer import Tokenizer

# What a chat template that can think puts where the assistant's turn begins.
_THINKING = re.compile(r"<think>\s*(</think>\s*)?$")
_CONTEXT = 30
_ROWS = 2
_SHOWN = 240
_WIDTH = 74
_EDGE = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
  """The prompts of one row.

  Attributes:
    source: name of its source.
    where: the row, in words.
    row: its fields.
    student: what the student continues.
    teacher: what the teacher reads; None for the student's very ids.
    own: what the teacher's own tokenizer makes of the student's template;
      None where `teacher` is set, and where it has no chat template.
  """

  source: str
  where: str
  row: dict[str, Any]
  student: Prompt
  teacher: Prompt | None
  own: Prompt | None

  @property
  def teacher_ids(self) -> tuple[int, ...]:
    """The ids that the teacher reads."""
    return (self.teacher or self.student).ids


def examples(setup: Setup, count: int) -> list[Example]:
  """The first rows of each source that are used, rendered and cut.

  Raises:
    InputError: a template that does not fit the row or a tokenizer.
  """
  data = setup.config.data
  found = []
  for name, source in data.sources.items():
    rendered = (
      _render(setup, name, source, row, sources.where(source, index))
      for index, row in enumerate(sources.read(source))
    )
    used = (
      example
      for example in rendered
      if 0 < len(example.student.ids) <= data.max_prompt_tokens
    )
    found += itertools.islice(used, count)
  return found


def inspect(setup: Setup) -> Section:
  """Renders the first prompts and looks for what commonly goes wrong."""
  found = examples(setup, _ROWS)
  lines: list[str] = []
  for example in found:
    lines += [*_side_by_side(setup, example), ""]
  lines += boundary(setup, found[0], ())
  sources_of = setup.config.data.sources
  findings: dict[tuple[str, str], Finding] = {}
  for example in found:
    source = sources_of[example.source]
    for finding in (
      *_bos(setup, example),
      *_thinking(setup, source, example),
      *_own_template(example),
    ):
      # One finding of a kind per source is enough.
      findings.setdefault((example.source, finding.name), finding)
  report = setup.prompts.report
  chats = [name for name, source in sources_of.items() if source.prompt.chat]
  cut = tuple(_truncated(setup, chats)) if report.truncated and chats else ()
  return Section(
    title="prompts",
    lines=tuple(lines),
    figures={
      "examples": [
        {
          "source": example.source,
          "where": example.where,
          "student": dataclasses.asdict(example.student),
          "teacher": example.teacher and dataclasses.asdict(example.teacher),
        }
        for example in found
      ]
    },
    findings=(*findings.values(), *cut),
  )


def boundary(setup: Setup, example: Example, drawn: Sequence[int]) -> list[str]:
  """Where prompt and completion meet, position by position.

  Args:
    setup: of the run.
    example: a row.
    drawn: the first ids of a completion; without them the slots are named.
  """
  rows = [("position", "student", "position", "teacher", "")]
  prompts = (example.student.ids, example.teacher_ids)
  tokens = (setup.tokenizer, setup.teacher_tokenizer)
  for back in range(min(_EDGE, *map(len, prompts)), 0, -1):
    ours, theirs = (ids[-back] for ids in prompts)
    rows.append(
      (
        f"{len(prompts[0]) - back}",
        _token(tokens[0], ours),
        f"{len(prompts[1]) - back}",
        _token(tokens[1], theirs),
        "prompt" if ours == theirs else "prompt, differs",
      )
    )
  for index in range(_EDGE):
    ours = theirs = "the drawn id"
    if drawn:
      if index >= len(drawn):
        break
      ours, theirs = (_token(side, drawn[index]) for side in tokens)
    first, second = (f"{len(ids) + index}" for ids in prompts)
    rows.append((first, ours, second, theirs, f"completion {index}"))
  return [f"where prompt and completion meet ({example.where}):", *table(rows)]


def first_difference(ours: Sequence[Any], theirs: Sequence[Any]) -> int | None:
  """The first index at which two sequences differ; None if they are equal."""
  for index, (left, right) in enumerate(zip(ours, theirs, strict=False)):
    if left != right:
      return index
  return None if len(ours) == len(theirs) else min(len(ours), len(theirs))


def _render(
  setup: Setup,
  name: str,
  source: SourceConfig,
  row: dict[str, Any],
  where: str,
) -> Example:
  theirs = setup.teacher_tokenizer
  data = setup.config.data

  def read(config: TemplateConfig, tokens: Tokenizer) -> Prompt:
    prompt = templates.prompt(config, row, tokens, where)
    if data.overlong == "truncate_left":
      ids = prompt.ids[-data.max_prompt_tokens :]
      prompt = dataclasses.replace(prompt, ids=ids)
    return prompt

  teacher = own = None
  if source.teacher_prompt is not None:
    teacher = read(source.teacher_prompt, theirs)
  elif not source.prompt.chat or theirs.has_chat_template:
    own = read(source.prompt, theirs)
  return Example(
    source=name,
    where=where,
    row=row,
    student=read(source.prompt, setup.tokenizer),
    teacher=teacher,
    own=own,
  )


def _side_by_side(setup: Setup, example: Example) -> Iterator[str]:
  """Both prompts as the models read them, and where they part."""
  yield f"source {example.source}, {example.where}"
  ours = example.student.ids
  text = _decode(setup.tokenizer, ours)
  yield f"student reads {len(ours)} ids"
  yield from _quoted(text)
  if example.teacher is not None:
    yield f"teacher reads {len(example.teacher.ids)} ids"
  else:
    yield "teacher reads the same ids"
  other = example.teacher or example.own
  if other is None:
    yield "(its tokenizer has no chat template of its own)"
    return
  other_text = _decode(setup.teacher_tokenizer, other.ids)
  slot = first_difference(ours, other.ids)
  if slot is None:
    yield "(its own tokenizer and template give the same)"
    return
  if example.teacher is None:
    yield "(its own template would have given these)"
  yield from _quoted(other_text)
  at = first_difference(text, other_text)
  if at is not None:
    yield f"first difference in the text, at character {at}:"
    yield from _marked(text, other_text, at)
  shown = [
    _token(tokens, ids[slot]) if slot < len(ids) else "the end"
    for tokens, ids in (
      (setup.tokenizer, ours),
      (setup.teacher_tokenizer, other.ids),
    )
  ]
  yield f"first difference in the ids, at {slot}: {shown[0]} / {shown[1]}"


def _quoted(text: str) -> Iterator[str]:
  """The lines of a text behind a bar; a long one without its middle."""
  if len(text) > 2 * _SHOWN:
    left_out = len(text) - 2 * _SHOWN
    text = f"{text[:_SHOWN]}\n[... {left_out} characters ...]\n{text[-_SHOWN:]}"
  for line in text.split("\n"):
    for part in textwrap.wrap(
      line, _WIDTH, drop_whitespace=False, replace_whitespace=False
    ) or [""]:
      yield f"  | {part}"


def _marked(ours: str, theirs: str, at: int) -> Iterator[str]:
  """Both texts around a character, and a mark below it."""
  start = max(at - _CONTEXT, 0)
  for role, text in (("student", ours), ("teacher", theirs)):
    yield f"  {role}  {_escaped(text[start : at + _CONTEXT])}"
  yield f"           {' ' * len(_escaped(ours[start:at]))}^"


def _bos(setup: Setup, example: Example) -> Iterator[Finding]:
  begins = {}
  for role, tokens, prompt in (
    ("student", setup.tokenizer, example.student),
    ("teacher", setup.teacher_tokenizer, example.teacher),
  ):
    if prompt is None:
      continue
    bos = dict(tokens.special_ids)["bos"]
    begins[role] = bos is not None and prompt.ids[:1] == (bos,)
    if bos is not None and prompt.ids[:2] == (bos, bos):
      key = "prompt" if role == "student" else "teacher_prompt"
      yield Finding(
        name="bos_doubled",
        message=(
          f"the {role}'s prompt of {example.where} begins with "
          f"{_token(tokens, bos)} twice (ids {list(prompt.ids[:4])}): the "
          "tokenizer adds one by itself and the text has one too; take "
          f"{tokens.vocabulary.get(bos)!r} out of "
          f"data.sources.{example.source}.{key}, or of the chat template"
        ),
      )
  if len(set(begins.values())) > 1:
    with_bos, without = sorted(begins, key=lambda role: not begins[role])
    yield Finding(
      name="bos_differs",
      message=(
        f"the {with_bos}'s prompt of {example.where} begins with a bos id, "
        f"the {without}'s does not: ids {list(example.student.ids[:4])} "
        f"(student), {list(example.teacher_ids[:4])} (teacher); set chat alike "
        f"in prompt and teacher_prompt of data.sources.{example.source}, or "
        "mend the chat template that has an extra bos or lacks one"
      ),
    )


def _thinking(
  setup: Setup, source: SourceConfig, example: Example
) -> Iterator[Finding]:
  ours, theirs = source.prompt, source.teacher_prompt
  for role, config, tokens in (
    ("prompt", ours, setup.tokenizer),
    ("teacher_prompt", theirs, setup.teacher_tokenizer),
  ):
    if config is not None and config.thinking is not None:
      texts = {
        _with_thinking(config, example, tokens, value)
        for value in (None, True, False)
      }
      if len(texts) == 1:
        yield Finding(
          name="thinking_ignored",
          message=(
            f"data.sources.{example.source}.{role}.thinking = "
            f"{config.thinking}, but the chat template in {tokens.path} gives "
            "the same text with True, False and None; leave it at None, or "
            "use the template of a model that can think"
          ),
        )
  if theirs is None or example.teacher is None:
    return
  switched = (
    ours.chat
    and theirs.chat
    and ours.thinking != theirs.thinking
    and example.teacher.text
    != _with_thinking(theirs, example, setup.teacher_tokenizer, ours.thinking)
  )
  tails = [_tail(example.student.text), _tail(example.teacher.text)]
  if switched or tails[0] != tails[1]:
    ends = [
      prompt.text[-_CONTEXT:] for prompt in (example.student, example.teacher)
    ]
    yield Finding(
      name="thinking_differs",
      message=(
        f"data.sources.{example.source}: prompt.thinking = {ours.thinking} "
        f"and teacher_prompt.thinking = {theirs.thinking}, and the student's "
        f"prompt ends in {ends[0]!r}, the teacher's in {ends[1]!r}; set both "
        "to the same value, so that both models begin the same kind of answer"
      ),
    )


def _with_thinking(
  config: TemplateConfig,
  example: Example,
  tokens: Tokenizer,
  value: bool | None,
) -> str:
  changed = dataclasses.replace(config, thinking=value)
  return templates.prompt(changed, example.row, tokens, example.where).text


def _tail(text: str) -> str:
  """Whether a prompt ends in an open thinking part, an empty one, or none."""
  found = _THINKING.search(text)
  if found is None:
    return "none"
  return "empty" if found.group(1) else "open"


def _own_template(example: Example) -> Iterator[Finding]:
  own = example.own
  if own is None:
    return
  at = first_difference(example.student.text, own.text)
  if at is not None:
    start = max(at - _CONTEXT // 2, 0)
    ours, theirs = (
      text[start : at + _CONTEXT] for text in (example.student.text, own.text)
    )
    yield Finding(
      name="chat_templates_differ",
      message=(
        f"the teacher reads the student's ids, but its own chat template "
        f"renders {example.where} differently from character {at} on: "
        f"{ours!r} / {theirs!r}; set "
        f'data.sources.{example.source}.teacher_prompt to {{"chat": True, '
        "...} if the teacher should read its own"
      ),
    )


def _truncated(setup: Setup, chats: Sequence[str]) -> Iterator[Finding]:
  report = setup.prompts.report
  config = setup.config.data
  yield Finding(
    name="chat_prompts_truncated",
    message=(
      f"{report.truncated} of {report.rows} prompts are longer than "
      f"data.max_prompt_tokens = {config.max_prompt_tokens} (the longest has "
      f"{report.longest}) and lose their first ids, with them the system "
      f"message or the begin of a turn (chat sources: {', '.join(chats)}); "
      'raise it, or set data.overlong to "drop"'
    ),
  )


def _token(tokens: Tokenizer, index: int) -> str:
  """An id and its text."""
  text = _decode(tokens, [index]) or tokens.vocabulary.get(index)
  return f"{index} {text!r}"


def _decode(tokens: Tokenizer, ids: Sequence[int]) -> str:
  """Text of ids, special tokens and all."""
  return tokens.decode(ids, skip_special_tokens=False)


def _escaped(text: str) -> str:
  """A text on one line."""
  return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")
