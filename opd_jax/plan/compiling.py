"""A step compiled for devices that need not exist, and its memory.

The compiler's own account of each program, on one device. A program that does
not fit has none: the compiler raises, and its message says by how much.
"""

import contextlib
import dataclasses
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from opd_jax import blueprint as blueprint_lib
from opd_jax import setup
from opd_jax.blueprint import Blueprint
from opd_jax.plan import hlo
from opd_jax.programs import Programs
from opd_jax.step import Step

_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_SIZE = r"([\d.]+)([KMGT]?)B?"
# What the compiler says when a program does not fit: shortly, or at length.
_USED = (
  rf"total memory required for .*?\({_SIZE}\)",
  rf"Used {_SIZE} of",
)
_AVAILABLE = (
  rf"exceeds available \w+ \({_SIZE}\)",
  rf"Used [\d.]+[KMGT]? of {_SIZE} \w+",
)
# Temporaries that are named.
_LARGEST = 8
_VALUE = re.compile(
  r"value: <\d+ (?P<name>[^\s{]+)\S* @\d+> "
  r"\(size=(?P<size>\d+),offset=(?P<offset>\d+)\): (?P<shape>[^{\s]+)"
)
_SOURCE = re.compile(r'^\s*%?(\S+) = .*op_name="([^"]*)"', re.MULTILINE)
_ALLOCATION = re.compile(
  rf"^\s*\d+\. Size: {_SIZE}\n(?P<rest>(?:(?!\s*=====).*\n?)*)", re.MULTILINE
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Account:
  """Bytes of one program on one device.

  Attributes:
    name: of the program.
    arguments: weights, optimizer state and the batch.
    temporaries: at its fullest moment.
    results: those that do not take the place of arguments.
    code: of the program itself.
    text: its optimised HLO; None where the compiler did not write it.
    largest: of the temporaries, bytes and the operations that make them.
  """

  name: str
  arguments: int
  temporaries: int
  results: int
  code: int
  text: str | None
  largest: tuple[tuple[int, str], ...]

  @property
  def total(self) -> int:
    """All of it."""
    return self.arguments + self.temporaries + self.results + self.code


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overflow:
  """A program that does not fit.

  Attributes:
    name: of the program.
    used: bytes that it would need; None where the compiler does not say.
    available: bytes that there are; likewise.
    largest: of its arrays, bytes and the operation that makes them.
  """

  name: str
  used: int | None
  available: int | None
  largest: tuple[tuple[int, str], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
  """A step that was compiled, as far as it fits.

  Attributes:
    step: the step.
    accounts: of the programs that fit.
    overflow: the program that does not; those behind it were not compiled.
    seconds: of the compilation.
  """

  step: Step
  accounts: tuple[Account, ...]
  overflow: Overflow | None
  seconds: float

  @property
  def total(self) -> int:
    """Bytes of the fullest program, and of the code of the others."""
    code = sum(account.code for account in self.accounts)
    return max(
      (account.total - account.code + code for account in self.accounts),
      default=0,
    )

  def fits(self, memory: int) -> bool:
    """Whether every program fits into so many bytes."""
    return self.overflow is None and self.total <= memory


def compile_step(blueprint: Blueprint, mesh: Mesh) -> Compiled:
  """Compiles all programs of a step.

  Raises:
    InputError: the mesh divides neither the batch nor a model.
  """
  step = setup.make_step(blueprint, mesh)
  layout = step.scorer.student.layout
  overflow = None
  with tempfile.TemporaryDirectory() as folder:
    dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    programs = Programs(step, blueprint.mode, dump)
    start = time.monotonic()
    try:
      programs.compile(
        step.abstract_state(),
        blueprint_lib.abstract_frozen(step.scorer),
        blueprint.abstract_inputs(layout),
      )
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      left = [name for name in programs.names if name not in programs.compiled]
      overflow = read_overflow(left[0], str(error))
    seconds = time.monotonic() - start
    accounts = tuple(
      _account(name, program, Path(folder))
      for name, program in programs.compiled.items()
    )
  return Compiled(
    step=step, accounts=accounts, overflow=overflow, seconds=seconds
  )


def _account(name: str, program: Any, dump: Path) -> Account:
  sizes = program.memory_analysis()
  text = _dumped(dump, name, "after_codegen")
  if text is None:
    # From a cache. What a newer compiler wrote jaxlib may not be able to read.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      text = program.as_text()
  buffers = _dumped(dump, name, "after_optimizations-buffer-assignment")
  return Account(
    name=name,
    arguments=sizes.argument_size_in_bytes,
    temporaries=sizes.temp_size_in_bytes,
    results=sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
    code=sizes.generated_code_size_in_bytes,
    text=text,
    largest=() if buffers is None else largest(buffers, text or ""),
  )


def _dumped(folder: Path, name: str, stage: str) -> str | None:
  """What the compiler wrote of a program at a stage."""
  files = sorted(folder.glob(f"*.jit_{name}*.{stage}.txt"))
  return files[-1].read_text() if files else None


def largest(buffers: str, text: str) -> tuple[tuple[int, str], ...]:
  """The largest temporaries, each place in memory once.

  Args:
    buffers: the compiler's table of buffers.
    text: the program, for the names that JAX gave its operations.
  """
  places: dict[tuple[int, int], tuple[str, str]] = {}
  for allocation in re.split(r"^allocation ", buffers, flags=re.MULTILINE):
    head = allocation.partition("\n")[0]
    if "preallocated-temp" not in head or "color" in head:
      continue
    for found in _VALUE.finditer(allocation):
      place = (int(found["size"]), int(found["offset"]))
      places.setdefault(place, (found["name"], found["shape"]))
  biggest = sorted(places.items(), key=lambda item: -item[0][0])[:_LARGEST]
  sources = dict(_SOURCE.findall(text)) if biggest else {}
  return tuple(
    (size, f"{shape} {hlo.scope_of(sources.get(name, name))}")
    for (size, _), (name, shape) in biggest
  )


def read_overflow(name: str, message: str) -> Overflow:
  """What the compiler says of a program that does not fit.

  Args:
    name: of the program.
    message: that it raised.
  """
  largest = []
  for found in _ALLOCATION.finditer(message):
    operation = re.search(r'op_name="([^"]*)"', found["rest"])
    shape = re.search(r"Shape: (\S+)", found["rest"])
    made = [part[1] for part in (shape, operation) if part]
    largest.append((_bytes(found[1], found[2]), " of ".join(made)))
  return Overflow(
    name=name,
    used=_first(_USED, message),
    available=_first(_AVAILABLE, message),
    largest=tuple(largest),
  )


def _first(patterns: tuple[str, ...], message: str) -> int | None:
  for pattern in patterns:
    if found := re.search(pattern, message):
      return _bytes(*found.groups())
  return None


def _bytes(number: str, unit: str) -> int:
  return round(float(number) * 1024 ** _UNITS[unit])
