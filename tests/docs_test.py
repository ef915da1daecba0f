"""The documentation is true: examples run, sections are new, names exist."""

import ast
import inspect
import math
import pathlib
import re
import typing

import pytest

from benchmarks import plan
from docs import generate, objective_needs, objective_pages
from opd_jax import cli, parsing
from opd_jax import config as config_lib
from opd_jax.objectives import OBJECTIVES, base

REPO = pathlib.Path(__file__).resolve().parent.parent
PAGES = [REPO / "README.md", *sorted((REPO / "docs").rglob("*.md"))]
README = PAGES[0].read_text()


def page_name(path):
  return str(path.relative_to(REPO))


def blocks(path):
  return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.S | re.M)


@pytest.mark.parametrize(
  "path", [path for path in PAGES if blocks(path)], ids=page_name
)
def test_examples_run(path):
  """The blocks of a page in order, in one namespace."""
  namespace = {"__name__": path.stem}
  for block in blocks(path):
    exec(compile(block, str(path), "exec"), namespace)
  if "get_config" in namespace:
    values = namespace["get_config"]()
    distils = "teacher" in values
    cls = config_lib.RunConfig if distils else config_lib.SftConfig
    parsing.parse(cls, values)


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_generated_sections_are_current(path):
  page = path.read_text()
  assert generate.fill(page) == page, "stale: run python -m docs.generate"


def test_every_objective_has_its_page():
  written = {
    path.name: path.read_text()
    for path in generate.OBJECTIVES.glob("*.md")
    if path.name != "README.md"
  }
  assert objective_pages.pages() == written, "run python -m docs.generate"
  assert set(written) == {f"{name}.md" for name in (*OBJECTIVES, "sft")}


def test_the_sections_of_docstrings_are_those_of_the_contract():
  text = inspect.cleandoc(OBJECTIVES["opd_k1"].__doc__)
  assert objective_pages.sections("opd_k1", text)["Descends"].startswith("KL(")
  for section in (*objective_pages.REQUIRED, objective_pages.DIFFERS):
    assert f"\n  {section}: " in base.__doc__
  for section in objective_pages.REQUIRED:
    lacking = text.replace(f"\n\n{section}: ", "\n\nOtherwise: ")
    with pytest.raises(ValueError, match=f"objective opd_k1: .*'{section}: '"):
      objective_pages.sections("opd_k1", lacking)


@pytest.mark.parametrize(
  ("name", "passes", "seen", "conditions"),
  [
    ("gkd", {"student": 3, "teacher": 1}, "vocabulary", ["given", "replayed"]),
    (
      "opd_k2",
      {"student": 3, "teacher": 1},
      "tokens",
      ["pure_sampling", "single_update"],
    ),
    (
      "exopd",
      {"student": 3, "teacher": 1, "reference": 1},
      "tokens",
      ["start"],
    ),
    (
      "reopold",  # Its `prepare` has read all that is read of the teacher.
      {"student": 4, "teacher": 1},
      "tokens, student's entropy",
      [],
    ),
    ("constant_negative_advantage", {"student": 3}, "tokens", []),
    ("tropd", {"student": 3, "teacher": 1}, "tokens, top 64", ["given"]),
  ],
)
def test_needs_on_the_pages(name, passes, seen, conditions):
  objective = objective_pages.bind(name)
  assert objective_needs.head_passes(objective) == passes
  assert objective_needs.signal(objective) == seen
  assert objective_needs.conditions(objective) == conditions


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_links_lead_somewhere(path):
  for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
    if "://" not in target:
      file, _, anchor = target.partition("#")
      page = path.parent / file if file else path
      assert page.exists(), target
      if anchor:
        titles = re.findall(r"^#+ (.*)", page.read_text(), re.M)
        assert anchor in {title.lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_commands_and_keys_exist(path):
  """Commands, config files and keys that a page names."""
  text = path.read_text()
  for command in re.findall(r"opd-jax ([a-z]+) +--", text):
    assert command in cli.COMMANDS
  for file in re.findall(r"--config=(configs/[\w/]+\.py)", text):
    assert (REPO / file).is_file(), file
  named = re.findall(r"--config\.([a-z_]+)(?:\.(\w+))?=", text)
  groups: dict[str, set[str]] = {}
  for cls in (config_lib.RunConfig, config_lib.SftConfig):
    for group, hint in typing.get_type_hints(cls).items():
      for option in (hint, *typing.get_args(hint)):
        fields = set(getattr(option, "__dataclass_fields__", ()))
        groups[group] = groups.get(group, set()) | fields
  spans = re.findall(r"`(\w+)\.(\w+)(?: = [^`]*)?`", text)
  named += [span for span in spans if span[0] in groups]
  groups["objective"] = {"name"}.union(
    *(module.Config.__dataclass_fields__ for module in OBJECTIVES.values())
  )
  for group, key in named:
    assert group in groups, group
    file = (REPO / "opd_jax" / f"{group}.{key}").exists()
    assert not key or key in groups[group] or file, f"{group}.{key}"


PLANS = plan.read()


@pytest.mark.parametrize("location", PLANS)
def test_a_plan_of_a_config_is_within_its_bars(location):
  """95 % of the memory, decoding within 15 % of weights and cache."""
  figures = PLANS[location]
  assert location in set(plan.locations())
  config = parsing.load(config_lib.RunConfig, str(REPO / location))
  sizes = {axis: config.mesh.sizes[axis] for axis in figures["mesh"]}
  devices = math.prod(figures["mesh"].values())
  assert sizes == figures["mesh"], "stale: run python -m benchmarks.plan"
  assert devices == figures["devices"]
  assert figures["fits"]
  if "programs" not in figures:
    used = figures["estimate"]["total_bytes"] / figures["memory_bytes"]
    assert location.startswith("configs/gpu/")
    assert used <= 0.95
    return
  assert figures["used"] <= 0.95
  decode = figures["speed"]["decode"]
  assert decode["weight_gathers"] == []
  assert 0.85 <= decode["ratio"] <= 1.15
  if location == "configs/pods/qwen3_8b_from_32b.py:v5p:4x4x4":
    (program,) = figures["programs"].values()
    assert program["temporary_bytes"] < 12 * 2**30


def test_readme_names_every_module_objective_and_config():
  package = REPO / "opd_jax"
  names = {path.name for path in package.glob("*.py")} - {"__init__.py"}
  names |= {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
  configs = REPO / "configs"
  names |= {
    path.relative_to(configs).as_posix() for path in configs.rglob("*.py")
  }
  names |= {path.name for path in (REPO / "launch").glob("*.sh")}
  names |= set(OBJECTIVES)
  missing = {name for name in names if f"`{name}`" not in README}
  assert not missing


def test_every_metric_is_explained():
  """Names of metrics are literals of these modules, or made from a role."""
  glossary = (REPO / "docs" / "metrics.md").read_text()
  named = {
    node.value
    for module in (
      "update",
      "step",
      "train",
      "sft",
      "meter",
      "programs",
      "checkpoint",
      "held_out",
    )
    for node in ast.walk(
      ast.parse((REPO / "opd_jax" / f"{module}.py").read_text())
    )
    if isinstance(node, ast.Constant)
    and isinstance(node.value, str)
    and re.fullmatch(r"[a-z]+/[a-z_]+", node.value)
  }
  assert len(named) > 10
  missing = {name for name in named if f"`{name}`" not in glossary}
  assert not missing
