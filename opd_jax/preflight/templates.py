"""What commonly goes wrong with prompts: bos, thinking, chat templates."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator

from opd_jax import templates
from opd_jax.config import SourceConfig, TemplateConfig
from opd_jax.errors import InputError
from opd_jax.preflight import prompts
from opd_jax.preflight.prompts import Rendered
from opd_jax.preflight.report import Finding, Section
from opd_jax.setup import Setup

# What a chat template that can think puts where the assistant's turn begins.
_THINKING = re.compile(r"<think>\s*(</think>\s*)?$")
_ROWS = 2


def inspect(setup: Setup) -> Section:
  """Renders the first prompts of each source and looks at them."""
  found = prompts.examples(setup, _ROWS)
  lines: list[str] = []
  for example in found:
    lines += [*prompts.side_by_side(setup, example), ""]
  lines += prompts.boundary(setup, found[0], ())
  sources = setup.config.data.sources
  findings: dict[tuple[str, str], Finding] = {}
  for example in found:
    source = sources[example.source]
    for finding in (
      *_bos(setup, example),
      *_thinking(setup, source, example),
      *_own_template(example),
    ):
      # One finding of a kind per source is enough.
      findings.setdefault((example.source, finding.name), finding)
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
    findings=(*findings.values(), *_truncated(setup)),
  )


def _bos(setup: Setup, example: Rendered) -> Iterator[Finding]:
  begins = {}
  for role, tokens, prompt in (
    ("student", setup.tokenizer, example.student),
    ("teacher", setup.teacher_tokenizer_of(example.source), example.other),
  ):
    bos = dict(tokens.special_ids)["bos"]
    if prompt is None:
      continue
    begins[role] = bos is not None and prompt.ids[:1] == (bos,)
    if (
      bos is not None
      and prompt.ids[:2] == (bos, bos)
      and prompt is not example.own
    ):
      key = "prompt" if role == "student" else "teacher_prompt"
      yield Finding(
        name="bos_doubled",
        message=(
          f"the {role}'s prompt of {example.where} begins with "
          f"{prompts.token(tokens, bos)} twice (ids {list(prompt.ids[:4])}): "
          "the tokenizer adds one and the text has one too; take "
          f"{tokens.vocabulary.get(bos)!r} out of "
          f"data.sources.{example.source}.{key}, or of the chat template"
        ),
      )
  if len(set(begins.values())) > 1:
    having = "student" if begins["student"] else "teacher"
    other = example.other or example.student
    own = (
      "by its own template; it reads the student's ids"
      if example.teacher is None
      else f"by data.sources.{example.source}.teacher_prompt"
    )
    yield Finding(
      name="bos_differs",
      message=(
        f"only the {having}'s prompt of {example.where} begins with a bos id: "
        f"ids {list(example.student.ids[:4])} (student), "
        f"{list(other.ids[:4])} (teacher, {own}); mend the chat template that "
        "has one too many or lacks one, or set `chat` alike in prompt and "
        "teacher_prompt"
      ),
    )


def _thinking(
  setup: Setup, source: SourceConfig, example: Rendered
) -> Iterator[Finding]:
  ours, theirs = source.prompt, source.teacher_prompt
  other = example.other
  if other is None:
    return
  switched = (
    theirs is not None
    and ours.thinking != theirs.thinking
    and _other_text(setup, theirs, example, ours.thinking) != other.text
  )
  if not switched and _tail(example.student.text) == _tail(other.text):
    return
  ends = [prompt.text[-30:] for prompt in (example.student, other)]
  if theirs is not None:
    cause = f"teacher_prompt.thinking = {theirs.thinking}"
    remedy = "set both to the same value"
  else:
    cause = "teacher_prompt = None: the teacher reads the student's ids"
    remedy = "choose a teacher of the same kind, or the other prompt.thinking"
  yield Finding(
    name="thinking_differs",
    message=(
      f"data.sources.{example.source}: prompt.thinking = {ours.thinking}, "
      f"{cause}; the student's prompt ends in {ends[0]!r}, that of the "
      f"teacher's template in {ends[1]!r}; {remedy}, so that both models begin "
      "the same kind of answer"
    ),
  )


def _other_text(
  setup: Setup, config: TemplateConfig, example: Rendered, thinking: bool | None
) -> str:
  """The teacher's prompt with another switch; as it is if there is none."""
  if config.chat:
    changed = dataclasses.replace(config, thinking=thinking)
    with contextlib.suppress(InputError):
      tokens = setup.teacher_tokenizer_of(example.source)
      return templates.prompt(changed, example.row, tokens, example.where).text
  return "" if example.teacher is None else example.teacher.text


def _tail(text: str) -> str:
  """Whether a prompt ends in an open thinking part, an empty one, or none."""
  found = _THINKING.search(text)
  if found is None:
    return "none"
  return "empty" if found.group(1) else "open"


def _own_template(example: Rendered) -> Iterator[Finding]:
  own = example.own
  if own is None:
    return
  at = prompts.first_difference(example.student.text, own.text)
  if at is not None:
    start = max(at - prompts.CONTEXT // 2, 0)
    ours, theirs = (
      text[start : at + prompts.CONTEXT]
      for text in (example.student.text, own.text)
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


def _truncated(setup: Setup) -> Iterator[Finding]:
  config = setup.config.data
  for name, report in setup.prompts.reports.items():
    if config.sources[name].prompt.chat and report.truncated:
      yield Finding(
        name="chat_prompts_truncated",
        message=(
          f"{report.truncated:,} of {report.rows:,} prompts of data.sources."
          f"{name} are longer than data.max_prompt_tokens = "
          f"{config.max_prompt_tokens} (the student's longest has "
          f"{report.longest}) and lose their first ids, with them the system "
          "message or the begin of a turn; raise it, or set data.overlong to "
          '"drop"'
        ),
      )
