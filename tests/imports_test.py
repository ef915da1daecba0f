"""Who may import whom: the layers of opd_jax, checked over its real files.

Imports inside functions count like those at the top of a file. A package
(models/, objectives/, sampling/) is one row; inside it, files may import each
other.
"""

import ast
import graphlib
import pathlib
from collections.abc import Iterator

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "opd_jax"

# Each layer may use those above it. Name a group only to shorten the table.
BASE = {
  "errors",
  "types",
  "config",
  "parsing",
  "sharding",
  "sequences",
  "messages",
  "processes",
  "storage",
}
TEXT = {"tokenizer", "templates", "arith", "data"}
PARTS = BASE | {"models", "sampling", "objectives"} | TEXT
CORE = PARTS | {
  "chunks",
  "scoring",
  "selector",
  "gradient",
  "optim",
  "replay",
  "update",
  "step",
  "programs",
}
MEASURES = {
  "held_out",
  "verifiers",
  "estimates",
  "generate",
  "evaluate",
  "rewards",
}
TOOLS = {
  "chips",
  "flops",
  "checkpoint",
  "metrics",
  "export",
  "meter",
  "summary",
}
RUN = (
  CORE | MEASURES | TOOLS | {"student", "task", "interrupts", "spool", "loop"}
)

# module: what of opd_jax it may import.
ALLOWED = {
  "__init__": set(),
  "errors": set(),
  "imports": set(),
  "types": {"errors"},
  "config": {"errors", "types"},
  "parsing": {"errors", "config"},
  "sharding": {"errors", "types", "config"},
  "sequences": {"errors", "types", "config"},
  "messages": set(),
  "processes": {"errors", "messages"},
  "storage": {"errors"},
  #
  "models": BASE,
  "sampling": BASE,
  "objectives": {"errors", "types", "parsing"},
  "tokenizer": BASE | {"imports"},
  "templates": BASE | {"tokenizer"},
  "arith": {"errors", "config", "parsing"},
  "data": BASE | {"tokenizer", "templates", "arith"},
  #
  "chunks": {"sharding"},
  "scoring": PARTS | {"chunks"},
  "selector": PARTS,
  "gradient": PARTS | {"scoring", "selector"},
  "optim": PARTS,
  "replay": {"types", "config"},
  "update": PARTS | {"scoring", "selector", "gradient", "optim", "replay"},
  "step": PARTS | {"scoring", "gradient", "optim", "replay", "update"},
  "programs": {"types", "step", "update"},
  #
  "verifiers": {"errors"},
  "estimates": set(),
  "student": PARTS,
  "held_out": CORE,
  "generate": PARTS,
  "evaluate": PARTS | {"verifiers", "estimates", "generate"},
  "rewards": BASE | TEXT | {"verifiers"},
  #
  "chips": set(),
  "flops": {"models"},
  "manifest": {"config", "errors"},
  "checkpoint": CORE | {"manifest"},
  "metrics": CORE | {"imports"},
  "export": CORE | {"checkpoint"},
  "meter": {"types", "chips", "metrics"},
  "summary": set(),
  #
  "task": {"config", "types", "models", "update", "meter"},
  "interrupts": {"types"},
  "spool": {"storage"},
  "loop": CORE | TOOLS | {"task", "interrupts", "spool"},
  "compatibility": PARTS | {"selector"},
  "blueprint": CORE | {"compatibility"},
  "setup": CORE | MEASURES | {"task", "compatibility", "blueprint", "student"},
  "memory": CORE,
  "preflight": CORE | {"setup", "memory"},
  "plan": CORE | {"blueprint", "setup", "memory", "chips", "flops"},
  "train": RUN | {"setup", "preflight"},
  "sft": RUN | {"setup", "preflight"},
  "saved": RUN | {"sft"},
  "run_export": RUN | {"saved"},
  #
  "cli": BASE
  | TEXT
  | {
    "setup",
    "preflight",
    "plan",
    "train",
    "sft",
    "run_export",
    "saved",
    "generate",
    "evaluate",
  },
}

# Third-party package: the only modules that may import it.
OWNERS = {
  "flax": {"models"},
  "orbax": {"checkpoint"},
  "transformers": {"tokenizer"},
  "grain": {"data"},
  "tensorflow_datasets": {"data"},
  "pyarrow": {"data"},
  "fsspec": {"storage"},
  "torch": set(),
  "tensorflow": set(),
}


def _modules() -> dict[str, list[pathlib.Path]]:
  """Files of opd_jax by their row in `ALLOWED`."""
  modules = {}
  for path in sorted(PACKAGE.rglob("*.py")):
    module = path.relative_to(PACKAGE).with_suffix("").parts[0]
    modules.setdefault(module, []).append(path)
  return modules


def _imports(source: str) -> Iterator[tuple[int, str]]:
  """Line and dotted name of each import; `from a import b` gives "a.b"."""
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield node.lineno, alias.name
    elif isinstance(node, ast.ImportFrom):
      if node.level:
        yield node.lineno, "." * node.level + (node.module or "")
        continue
      for alias in node.names:
        yield node.lineno, f"{node.module}.{alias.name}"


def _complaint(module: str, name: str) -> str | None:
  """Why `module` must not import `name`; None if it may."""
  top, _, rest = name.partition(".")
  if name.startswith("."):
    return f"imports {name}; write the absolute name, opd_jax.<module>"
  if top == "opd_jax":
    target = rest.partition(".")[0]
    # `from opd_jax import __version__` is the package's own attribute.
    if target not in ALLOWED or target in {module, "__init__"}:
      return None
    if target not in ALLOWED[module]:
      return (
        f"imports opd_jax.{target}, which its row in ALLOWED does not list; "
        "pass the thing in as an argument, or move it to a lower layer"
      )
  elif top in OWNERS and module not in OWNERS[top]:
    owners = ", ".join(sorted(OWNERS[top])) or "no module"
    return f"imports {top}, which only {owners} may do (OWNERS)"
  return None


def test_every_module_has_a_row():
  missing = sorted(set(_modules()) - set(ALLOWED))
  assert not missing, (
    f"not in the table: {missing}. Add a row to ALLOWED in "
    "tests/imports_test.py that lists the opd_jax modules it may import, and "
    "name it in the rows, or the group, of those that may import it"
  )


def test_a_module_has_at_most_500_lines():
  long = {
    path.name: lines
    for path in PACKAGE.rglob("*.py")
    if (lines := len(path.read_text().splitlines())) > 500
  }
  assert not long, f"{long}: move an idea of it to a module of its own"


def test_table_has_no_cycle():
  names = {name for targets in ALLOWED.values() for name in targets}
  assert names <= set(ALLOWED), f"no row for {sorted(names - set(ALLOWED))}"
  tuple(graphlib.TopologicalSorter(ALLOWED).static_order())


@pytest.mark.parametrize("module", sorted(ALLOWED))
def test_imports(module):
  complaints = [
    f"opd_jax/{path.relative_to(PACKAGE)}:{line} {complaint}"
    for path in _modules().get(module, [])
    for line, name in _imports(path.read_text())
    if (complaint := _complaint(module, name))
  ]
  assert not complaints, "\n".join(["", *complaints])


@pytest.mark.parametrize(
  ("module", "source", "allowed"),
  [
    ("step", "from opd_jax import scoring", True),
    ("step", "import opd_jax.objectives.base as base", True),
    ("models", "from flax import nnx", True),
    ("objectives", "from opd_jax.objectives import base", True),
    ("objectives", "from opd_jax import sequences", False),
    ("objectives", "from . import base", False),
    ("sampling", "def f():\n  import opd_jax.models.api", False),
    ("sampling", "if True:\n  from opd_jax.models import api", False),
    ("train", "import flax.nnx", False),
    ("export", "import orbax.checkpoint as ocp", False),
    ("tokenizer", "import torch.nn", False),
    ("data", "import tensorflow_datasets", True),
    ("cli", "import tensorflow as tf", False),
  ],
)
def test_the_check_itself(module, source, allowed):
  complaints = [_complaint(module, name) for _, name in _imports(source)]
  assert all(c is None for c in complaints) == allowed
