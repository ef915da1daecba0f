"""Writes the parts of docs/*.md that come from docstrings.

    python docs/generate.py

What stands between `<!-- begin NAME -->` and `<!-- end NAME -->` is replaced
by the section of that name; tests/docs_test.py fails where a page is stale.
"""

import dataclasses
import inspect
import re
import sys
import textwrap
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from opd_jax import config
from opd_jax.objectives import OBJECTIVES, estimators, reduce, supports
from opd_jax.objectives.divergences import DIVERGENCES, PARAMETERS
from opd_jax.preflight import KINDS

FOLDER = Path(__file__).resolve().parent


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
  if isinstance(hint, types.UnionType):
    return " or ".join(map(type_name, typing.get_args(hint)))
  if hint is type(None):
    return "`None`"
  if typing.get_origin(hint) is tuple:
    (item, _) = typing.get_args(hint)
    return f"tuple of {item.__name__}"
  if typing.get_origin(hint) is Mapping:
    return "group"
  return hint.__name__


def table(cls: type, prefix: str = "") -> str:
  """The fields of a dataclass: key, type, default, meaning."""
  hints, told = typing.get_type_hints(cls), attributes(cls)
  lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
  for field in dataclasses.fields(cls):
    key = f"`{prefix}{field.name}`"
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
    meaning = told[field.name].replace("|", r"\|")
    lines.append(f"| {key} | {form} | {default} | {meaning} |")
  return "\n".join(lines)


def summary(cls: type) -> str:
  """The docstring of a class up to its attributes."""
  text = inspect.cleandoc(cls.__doc__ or "")
  return text.partition("\nAttributes:\n")[0].strip()


def markdown(docstring: str) -> str:
  """Paragraphs as they are, indented ones as code."""
  blocks = []
  for block in inspect.cleandoc(docstring).split("\n\n"):
    if block.startswith("  "):
      block = f"```text\n{textwrap.dedent(block)}\n```"
    blocks.append(block)
  return "\n\n".join(blocks)


def configuration() -> str:
  """Every key of a config, group by group."""
  parts = ["## The run", table(config.RunConfig)]
  for name, hint in typing.get_type_hints(config.RunConfig).items():
    if cls := group_of(hint):
      parts += [f"## {name}", summary(cls), table(cls, f"{name}.")]
  for name, cls, prefix in (
    ("sources", config.SourceConfig, "data.sources.NAME."),
    ("prompt", config.TemplateConfig, "prompt."),
  ):
    parts += [f"## {name}", summary(cls), table(cls, prefix)]
  return "\n\n".join(parts)


def sft() -> str:
  """The groups of keys in which `sft` differs from `train`."""
  before = typing.get_type_hints(config.RunConfig)
  parts = []
  for name, cls in typing.get_type_hints(config.SftConfig).items():
    if is_group(cls) and cls is not before[name]:
      parts += [summary(cls), table(cls, f"{name}.")]
  return "\n\n".join(parts)


def objectives() -> str:
  """Every objective: what its file says, and its options."""
  parts = []
  for name, module in sorted(OBJECTIVES.items()):
    parts += [f"### {name}", markdown(module.__doc__ or "")]
    parts += [table(module.Config, "objective.")]
  return "\n\n".join(parts)


def reductions() -> str:
  """The formulas of `reduce.row_scale`."""
  text = inspect.cleandoc(reduce.row_scale.__doc__ or "")
  return markdown(text.partition("\n\n")[2])


def divergences() -> str:
  """The first line of each divergence, and its parameter."""
  lines = ["| divergence | per position | option |", "|---|---|---|"]
  for name, function in DIVERGENCES.items():
    meaning = inspect.cleandoc(function.__doc__ or "").split("\n\n")[0]
    meaning = " ".join(meaning.split()).replace("|", r"\|")
    option = f"`{PARAMETERS[name][0]}`" if name in PARAMETERS else ""
    lines.append(f"| `{name}` | {meaning} | {option} |")
  return "\n".join(lines)


def module_text(module: types.ModuleType) -> str:
  """The docstring of a module below its first line."""
  text = inspect.cleandoc(module.__doc__ or "")
  return markdown(text.partition("\n\n")[2])


def findings() -> str:
  """What preflight can find."""
  rows = [
    f"| `{name}` | {severity} | {meaning} |"
    for name, (severity, meaning) in KINDS.items()
  ]
  return "\n".join(["| name | severity | meaning |", "|---|---|---|", *rows])


def study(section: str) -> str:
  """A part of the results of `benchmarks/objectives.py`."""
  sys.path.insert(0, str(FOLDER.parent))
  from benchmarks.study import results, tables

  return getattr(tables, section)(results.read())


SECTIONS = {
  "configuration": configuration,
  "sft": sft,
  "objectives": objectives,
  "reductions": reductions,
  "divergences": divergences,
  "supports": lambda: module_text(supports),
  "estimators": lambda: module_text(estimators),
  "findings": findings,
  "study_objectives": lambda: study("objectives"),
  "study_notes": lambda: study("notes"),
  "study_claims": lambda: study("claimed"),
  "study_circumstances": lambda: study("circumstances"),
}


def fill(page: str) -> str:
  """A page with its generated sections made anew."""

  def section(found: re.Match[str]) -> str:
    begin, name, end = found.groups()
    return f"{begin}\n\n{SECTIONS[name]()}\n\n{end}"

  marked = r"(<!-- begin (\w+) -->).*?(<!-- end \2 -->)"
  return re.sub(marked, section, page, flags=re.DOTALL)


def main() -> None:
  """Rewrites the pages in place."""
  for path in FOLDER.glob("*.md"):
    path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
  main()
