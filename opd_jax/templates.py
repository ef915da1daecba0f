"""A row of data as the text and the ids that a model continues."""

import dataclasses
import string
from collections.abc import Mapping
from typing import Any

from opd_jax.config import TemplateConfig
from opd_jax.errors import InputError
from opd_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
  """What a model reads before its completion.

  Attributes:
    text: as given to the tokenizer; with a chat template, special tokens and
      all.
    ids: its tokens.
  """

  text: str
  ids: tuple[int, ...]


def prompt(
  config: TemplateConfig,
  row: Mapping[str, Any],
  tokenizer: Tokenizer,
  where: str,
) -> Prompt:
  """Renders and encodes the prompt of a row.

  A plain prompt gets the special tokens that the tokenizer adds by itself. The
  text of a chat template has its own, so none are added.

  Args:
    config: the template.
    row: fields by name.
    tokenizer: of the model that will read it.
    where: the row, for messages: "FILE, line 3".

  Raises:
    InputError: a field the row does not have or that is no text, a malformed
      template, messages that are none, no chat template.
  """
  if config.chat:
    text = tokenizer.chat(
      _messages(config, row, where), thinking=config.thinking
    )
    text = _newlines(config, text)
    ids = tokenizer.encode(text, special_tokens=False)
  else:
    text = _newlines(config, fill(config.text, row, where))
    ids = tokenizer.encode(text)
  return Prompt(text=text, ids=tuple(ids[: config.first_tokens]))


def fill(template: str, row: Mapping[str, Any], where: str) -> str:
  """A template with the row's fields in place of `{field}`.

  Numbers and booleans become their usual text.

  Raises:
    InputError: a field the row does not have or that is no text, or a
      malformed template.
  """
  parts = []
  for literal, field in _parse(template):
    parts.append(literal)
    if field is not None:
      parts.append(_text(template, field, row, where))
  return "".join(parts)


def fields(template: str) -> tuple[str, ...]:
  """The fields that a template names."""
  return tuple(field for _, field in _parse(template) if field is not None)


def _parse(template: str) -> list[tuple[str, str | None]]:
  try:
    parts = list(string.Formatter().parse(template))
  except ValueError as error:
    raise InputError(
      f"malformed template {template!r}: {error}; write {{field}} for a field "
      "of the row, and {{{{ and }}}} for braces"
    ) from error
  for _, field, form, conversion in parts:
    if field is not None and (field == "" or form or conversion):
      raise InputError(
        f"template {template!r} must name each field as {{field}}, nothing "
        "more; write {{ and }} for braces"
      )
  return [(literal, field) for literal, field, _, _ in parts]


def _text(template: str, field: str, row: Mapping[str, Any], where: str) -> str:
  if field not in row:
    raise InputError(
      f"{where}: no field {field!r}, which the template {template!r} needs; "
      f"the row has {', '.join(row) or 'none'}; change the template of this "
      "source (prompt.text, teacher_prompt.text, completion, answer)"
    )
  value = row[field]
  if not isinstance(value, str | int | float):
    raise InputError(
      f"{where}: field {field!r} must be text, got {type(value).__name__}; "
      f"name another in the template {template!r}"
    )
  text = str(value)
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise InputError(
      f"{where}: field {field!r} is not valid text ({error.reason} at "
      f"character {error.start}); correct the row"
    ) from error
  return text


def _newlines(config: TemplateConfig, text: str) -> str:
  if config.replace_newlines is None:
    return text
  return text.replace("\n", config.replace_newlines)


def _messages(
  config: TemplateConfig, row: Mapping[str, Any], where: str
) -> list[dict[str, str]]:
  if config.messages is None:
    messages = [{"role": "user", "content": fill(config.text, row, where)}]
    if config.system is not None:
      system = {"role": "system", "content": fill(config.system, row, where)}
      messages.insert(0, system)
    return messages
  found = row.get(config.messages)
  if (
    not isinstance(found, list)
    or not found
    or not all(
      isinstance(message, Mapping)
      and all(isinstance(message.get(k), str) for k in ("role", "content"))
      for message in found
    )
  ):
    raise InputError(
      f"{where}: field {config.messages!r} must be a list of messages, each "
      f'{{"role": ..., "content": ...}}, got {found!r:.80}; the row has '
      f"{', '.join(row)}; name the right one in prompt.messages"
    )
  return [{"role": m["role"], "content": m["content"]} for m in found]
