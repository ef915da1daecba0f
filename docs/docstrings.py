"""What docstrings and dataclasses say, as Markdown."""

import dataclasses
import inspect
import itertools
import re
import textwrap
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal


def attributes(cls: type) -> dict[str, str]:
  """What the docstrings of a dataclass and its bases say of each field."""
  found: dict[str, str] = {}
  for base in reversed(cls.__mro__):
    _, _, section = inspect.cleandoc(base.__doc__ or "").partition(
      "\nAttributes:\n"
    )
    entries = textwrap.dedent(section.split("\n\n")[0])
    for entry in re.split(r"\n(?=\w)", entries):
      name, _, text = entry.partition(":")
      found[name] = " ".join(text.split())
  return found


def is_group(hint: Any) -> bool:
  """Whether a type is a dataclass of keys."""
  return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def group_of(hint: Any) -> type | None:
  """The dataclass of keys that a type is, or may be beside None."""
  options = [hint]
  if isinstance(hint, types.UnionType):
    options = [*typing.get_args(hint)]
  return next(filter(is_group, options), None)


def type_name(hint: Any) -> str:
  """A type as a reader of configs writes its values."""
  if typing.get_origin(hint) is Literal:
    return " or ".join(f'`"{value}"`' for value in typing.get_args(hint))
  if typing.get_origin(hint) in (types.UnionType, typing.Union):
    return " or ".join(map(type_name, typing.get_args(hint)))
  if hint is type(None):
    return "`None`"
  if typing.get_origin(hint) is tuple:
    (item, _) = typing.get_args(hint)
    return f"tuple of {item.__name__}"
  if typing.get_origin(hint) is Mapping:
    return "group"
  return hint.__name__


def cell(text: str) -> str:
  """Text of several lines as one cell of a table."""
  return " ".join(text.split()).replace("|", r"\|")


def rows(header: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
  """A table of cells."""
  ruled = [f"| {' | '.join(line)} |" for line in (header, *lines)]
  return "\n".join([ruled[0], "|" + "---|" * len(header), *ruled[1:]])


def table(cls: type, prefix: str = "") -> str:
  """The fields of a dataclass: key, type, default, meaning."""
  hints, told = typing.get_type_hints(cls), attributes(cls)
  lines = []
  for field in dataclasses.fields(cls):
    form, default = type_name(hints[field.name]), "required"
    if field.default is not dataclasses.MISSING:
      shown = repr(field.default).replace("'", '"')
      default = f"`{shown}`"
    if field.default_factory is not dataclasses.MISSING:
      default = f"`{field.default_factory()!r}`"
    hint = hints[field.name]
    if is_group(hint) or (group_of(hint) and not prefix):
      form = f"[group](#{field.name})"
      if default not in ("required", "`None`"):
        default = "its defaults"
    key = f"`{prefix}{field.name}`"
    lines.append((key, form, default, cell(told[field.name])))
  return rows(("key", "type", "default", "meaning"), lines)


def summary(documented: Any) -> str:
  """A docstring up to its arguments or attributes."""
  text = inspect.cleandoc(documented.__doc__ or "")
  return re.split(r"\n(?:Args|Attributes):\n", text)[0].strip()


def body(documented: Any) -> str:
  """The same below its first line, as Markdown."""
  return markdown(summary(documented).partition("\n\n")[2])


def markdown(text: str) -> str:
  """A clean docstring: a paragraph is a line, an indented one is code."""
  blocks = []
  for code, group in itertools.groupby(
    text.split("\n\n"), lambda block: block.startswith("  ")
  ):
    if code:
      lines = textwrap.dedent("\n\n".join(group))
      blocks.append(f"```text\n{lines}\n```")
    else:
      blocks += [
        block if block.startswith("- ") else " ".join(block.split())
        for block in group
      ]
  return "\n\n".join(blocks)
