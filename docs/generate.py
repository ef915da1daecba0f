"""Writes the parts of the documentation that come from docstrings.

    python -m docs.generate

In README.md, the pages of docs/ and docs/objectives/README.md, what stands
between `<!-- begin NAME -->` and `<!-- end NAME -->` is replaced by the section
of that name. The other pages of docs/objectives/ are written whole.
tests/docs_test.py fails where a page is stale.
"""

import re
import typing
from pathlib import Path

from benchmarks import plan as plans
from benchmarks.study import results, tables
from docs import objective_pages
from docs.docstrings import (
  body,
  cell,
  group_of,
  is_group,
  rows,
  summary,
  table,
)
from opd_jax import config, selector
from opd_jax.objectives import estimators, policy, reduce, supports
from opd_jax.objectives.divergences import DIVERGENCES, PARAMETERS
from opd_jax.preflight import KINDS

FOLDER = Path(__file__).resolve().parent
OBJECTIVES = FOLDER / "objectives"


def configuration() -> str:
  """Every key of a config, group by group."""
  parts = ["## The run", table(config.RunConfig)]
  for name, hint in typing.get_type_hints(config.RunConfig).items():
    if cls := group_of(hint):
      parts += [f"## {name}", summary(cls), table(cls, f"{name}.")]
  for name, cls, prefix in (
    ("lora", config.LoraConfig, "student.lora."),
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


def divergences() -> str:
  """The first line of each divergence, and its parameter."""
  lines = []
  for name, function in DIVERGENCES.items():
    meaning = cell(summary(function).split("\n\n")[0])
    option = f"`{PARAMETERS[name][0]}`" if name in PARAMETERS else ""
    lines.append((f"`{name}`", meaning, option))
  return rows(("divergence", "per position", "option"), lines)


def findings() -> str:
  """What preflight can find."""
  lines = [(f"`{name}`", *found) for name, found in KINDS.items()]
  return rows(("name", "severity", "meaning"), lines)


SECTIONS = {
  "comparison": objective_pages.comparison,
  "conditions": objective_pages.legend,
  "configuration": configuration,
  "divergences": divergences,
  "estimators": lambda: body(estimators),
  "findings": findings,
  "objectives": objective_pages.catalogue,
  "plans": lambda: plans.table(plans.read()),
  "policy": lambda: f"{body(policy)}\n\n{body(policy.surrogate)}",
  "reductions": lambda: body(reduce.row_scale),
  "selection": lambda: body(selector),
  "sft": sft,
  "study_circumstances": lambda: tables.circumstances(results.read()),
  "study_claims": lambda: tables.claimed(results.read()),
  "study_notes": lambda: tables.notes(results.read()),
  "study_objectives": lambda: tables.objectives(results.read()),
  "supports": lambda: body(supports),
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
  main_page = FOLDER.parent / "README.md"
  for path in (main_page, *FOLDER.glob("*.md"), OBJECTIVES / "README.md"):
    path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")
  for name, text in objective_pages.pages().items():
    (OBJECTIVES / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
  main()
