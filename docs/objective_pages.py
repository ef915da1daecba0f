"""A page for each objective, and the tables that list and compare them.

All of it comes from the module of the objective: its docstring, whose sections
`opd_jax/objectives/base.py` names, its options, and what it needs of the models
with the default options.
"""

import dataclasses
import inspect
import re
from pathlib import Path
from types import ModuleType

from docs.docstrings import attributes, cell, markdown, rows, summary, table
from docs.objective_needs import (
  conditions,
  cost,
  head_passes,
  needed,
  prepare_pass,
  signal,
)
from opd_jax.objectives import OBJECTIVES, sft
from opd_jax.objectives.base import Needs, Objective

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
FOLDER = "docs/objectives/"

# The objectives of `train`, and that of the command `sft`.
MODULES: dict[str, ModuleType] = dict(
  sorted({**OBJECTIVES, "sft": sft}.items())
)

REQUIRED = ("Descends", "Off policy", "Use it when", "Source")
DIFFERS = "Differs"

# Names in docstrings that have a place in these pages.
PLACES = {
  **{name: f"{name}.md" for name in MODULES},
  "divergences": "README.md#divergences",
  "estimators": "README.md#estimates-from-the-drawn-token",
  "policy.surrogate": "README.md#policy-gradient",
  "reduce.row_scale": "README.md#reductions",
  "supports": "README.md#supports",
  "opd-jax sft": "../sft.md",
}


def sections(name: str, docstring: str) -> dict[str, str]:
  """The parts of an objective's docstring by their names, "" for the first.

  Raises:
    ValueError: a required one is missing.
  """
  label = "|".join((*REQUIRED, DIFFERS))
  first, *rest = re.split(rf"\n\n({label}): ", inspect.cleandoc(docstring))
  found = dict(zip(rest[::2], rest[1::2], strict=True))
  for section in REQUIRED:
    if section not in found:
      raise ValueError(
        f"objective {name}: the docstring of its module has no paragraph that "
        f"begins with '{section}: '; opd_jax/objectives/base.py says what "
        "belongs there"
      )
  return {"": first, **found}


def linked(text: str, own: str = "", folder: str = "") -> str:
  """Names that have a place, and numbers of papers, as links to them.

  Args:
    text: Markdown.
    own: the page that it is on, which is not linked to.
    folder: where the pages of the objectives are, seen from that page.
  """

  def name(found: re.Match[str]) -> str:
    place = PLACES.get(found[1], "")
    if not place or found[1] == own:
      return found[0]
    return f"[{found[0]}]({folder}{place})"

  parts = re.split(r"(^```.*?^```)", text, flags=re.S | re.M)
  for index in range(0, len(parts), 2):
    part = re.sub(r"`([^`\n]+)`", name, parts[index])
    parts[index] = re.sub(
      r"arXiv\s(\d{4}\.\d{5})",
      r"[arXiv \1](https://arxiv.org/abs/\1)",
      part,
    )
  return "".join(parts)


def told_by(name: str) -> dict[str, str]:
  """The sections of an objective by its name."""
  return sections(name, MODULES[name].__doc__ or "")


def bind(name: str) -> Objective:
  """An objective with its default options, with one update per rollout."""
  module = MODULES[name]
  return Objective.bind(name, module, module.Config()).starting_here()


def origin(source: str) -> str:
  """The first paper of a section "Source", or its first sentence."""
  text = " ".join(source.split())
  paper = re.match(r".*?(arXiv \d{4}\.\d{5}|\(\d{4}\))", text)
  return paper[0] if paper else text.partition(". ")[0].rstrip(".")


def comparison() -> str:
  """All objectives, with their default options."""
  lines = []
  for name in MODULES:
    told, objective = told_by(name), bind(name)
    frozen = [role for role in head_passes(objective) if role != "student"]
    line = (
      f"`{name}`",
      cell(told["Descends"]).rstrip("."),
      signal(objective),
      ", ".join(frozen) or "none",
      prepare_pass(objective),
      cell(told["Off policy"]).partition(". ")[0].rstrip("."),
      "no" if objective.needs.single_update else "yes",
      ", ".join(f"`{flag}`" for flag in conditions(objective)),
      origin(told["Source"]),
    )
    lines.append(tuple(map(linked, line)))
  header = (
    "objective",
    "descends",
    "sees",
    "frozen models",
    "pass before the update",
    "off policy",
    "several updates",
    "conditions",
    "source",
  )
  return rows(header, lines)


def legend() -> str:
  """What the conditions in the comparison mean."""
  meant = attributes(Needs)
  named = {flag for name in MODULES for flag in conditions(bind(name))}
  return "\n".join(f"- `{flag}`: {meant[flag]}" for flag in sorted(named))


def catalogue() -> str:
  """The list of the main page: what each is, and the configs that take it."""
  lines = []
  for name in MODULES:
    told = told_by(name)
    line = (
      f"`{name}`",
      cell(told[""].partition("\n\n")[0]).rstrip("."),
      origin(told["Source"]),
      ", ".join(f"`{file}`" for file in configs_of(name)),
    )
    lines.append(tuple(linked(part, folder=FOLDER) for part in line))
  return rows(("objective", "what it is", "source", "configs"), lines)


def configs_of(name: str) -> list[str]:
  """The files of `configs/` that take an objective."""
  return [
    path.relative_to(CONFIGS).as_posix()
    for path in sorted(CONFIGS.rglob("*.py"))
    if f'"objective": {{"name": "{name}"' in path.read_text(encoding="utf-8")
  ]


def page(name: str) -> str:
  """The page of an objective."""
  told, objective = told_by(name), bind(name)
  title, _, formula = told[""].partition("\n\n")
  config = MODULES[name].Config
  options = summary(config)
  if dataclasses.fields(config):
    options = table(config, "objective.")
  path = f"opd_jax/objectives/{name}.py"
  parts = [
    f"<!-- Made by docs/generate.py from {path}. -->",
    f"# {name}",
    title,
    f"**Descends** {markdown(told['Descends'])}",
    f"**Off policy:** {markdown(told['Off policy'])}",
    f"**Use it when** {markdown(told['Use it when'])}",
    "## Formula",
    markdown(formula),
    "## Options",
    options,
    "## Needs and cost",
    "With the default options. The cost is on top of drawing the tokens and "
    "of the student's own trunk; D is the width of a model, V the shared "
    "vocabulary, C `batch.chunk_tokens`.",
    needed(objective),
    cost(objective),
    "## Where it comes from",
    f"**Source:** {markdown(told['Source'])}",
  ]
  if DIFFERS in told:
    parts.append(f"**Differs:** {markdown(told[DIFFERS])}")
  parts.append(
    f"[The code](../../{path}); [all objectives](README.md#comparison)."
  )
  return linked("\n\n".join(parts), name) + "\n"


def pages() -> dict[str, str]:
  """Every page by its file name."""
  return {f"{name}.md": page(name) for name in MODULES}
