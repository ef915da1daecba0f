"""What would make a step fit that does not.

Changes are ranked by the counted memory, then tried in this order: each is
compiled until three fit. Without a compiler the first three stand as counted.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

from opd_jax.config import RunConfig
from opd_jax.errors import InputError
from opd_jax.plan.compiling import Compiled
from opd_jax.plan.fit import Counted, Load
from opd_jax.sharding import MESH_AXES

# Changes that are found, and those that are compiled to find them.
WANTED = 3
TRIED = 6

# The changes of the lowest counted memory whose pairs are looked at.
_PAIRED = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
  """Config keys with other values.

  Attributes:
    overrides: "KEY=VALUE" each.
    alters: what becomes of the run; "" where it computes the same.
  """

  overrides: tuple[str, ...]
  alters: str = ""

  @property
  def keys(self) -> frozenset[str]:
    """What it changes; all sizes of the mesh are one thing."""
    names = (override.partition("=")[0] for override in self.overrides)
    return frozenset(
      "mesh" if name.startswith("mesh.") else name for name in names
    )

  @property
  def flags(self) -> str:
    """As they are written on a command line."""
    return " ".join(f"--config.{override}" for override in self.overrides)

  def and_(self, other: "Change") -> "Change":
    """Both changes."""
    alters = "; ".join(part for part in (self.alters, other.alters) if part)
    return Change(overrides=self.overrides + other.overrides, alters=alters)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remedy:
  """A change that was tried.

  Attributes:
    change: the change.
    fits: whether it fits.
    counted: bytes of a device with it, as counted.
    compiled: the step with it; None where only counted.
  """

  change: Change
  fits: bool
  counted: int
  compiled: Compiled | None

  @property
  def total(self) -> int:
    """Bytes of a device; of one that does not fit, what was compiled of it."""
    return self.counted if self.compiled is None else self.compiled.total


def find(
  load: Load,
  counted: Counted,
  needed: int,
  count: Callable[[RunConfig], Counted],
  compile_: Callable[[Counted, Change], Compiled],
) -> list[Remedy]:
  """Changes with which a step fits, and what was tried for them.

  Args:
    load: the run's config with more overrides.
    counted: the run as it is.
    needed: bytes of a device that it takes by the compiler's account.
    count: counts a run.
    compile_: compiles a counted run, with a change to name.

  Returns:
    What was compiled, in its order; at most `WANTED` of it fit.
  """
  # By as much as the count is wrong here, it is wrong for the others.
  scale = needed / counted.estimate.total
  found: list[Remedy] = []
  for change, changed in ranked(load, counted, scale, count):
    compiled = compile_(changed, change)
    fits = compiled.fits(changed.memory)
    found.append(
      Remedy(
        change=change,
        fits=fits,
        counted=changed.estimate.total,
        compiled=compiled,
      )
    )
    if sum(one.fits for one in found) == WANTED or len(found) == TRIED:
      break
  return found


def count_only(
  load: Load, counted: Counted, count: Callable[[RunConfig], Counted]
) -> list[Remedy]:
  """As `find`, by the count alone."""
  return [
    Remedy(
      change=change, fits=True, counted=changed.estimate.total, compiled=None
    )
    for change, changed in ranked(load, counted, 1.0, count)[:WANTED]
  ]


def ranked(
  load: Load,
  counted: Counted,
  scale: float,
  count: Callable[[RunConfig], Counted],
) -> list[tuple[Change, Counted]]:
  """Changes that should fit, the most likely and least invasive first.

  Single changes come before pairs, those that compute the same run before
  others, and then the one of the least counted memory.
  """

  def look(changes: Iterator[Change]) -> Iterator[tuple[Change, Counted]]:
    for change in changes:
      try:
        yield change, count(load(change.overrides))
      except InputError:
        continue  # This run cannot have it: a size that it does not divide.

  def size(one: tuple[Change, Counted]) -> int:
    return one[1].estimate.total

  now = counted.estimate.total
  config = counted.blueprint.config
  singles = [one for one in look(changes(config, counted)) if size(one) < now]
  singles.sort(key=lambda one: (bool(one[0].alters), size(one)))
  best = _one_of_a_kind(singles)[:_PAIRED]
  pairs = look(
    first.and_(second)
    for (first, _), (second, _) in itertools.combinations(best, 2)
  )
  fitting = [
    one for one in (*singles, *pairs) if size(one) * scale <= counted.memory
  ]
  fitting.sort(
    key=lambda one: (len(one[0].keys), bool(one[0].alters), size(one))
  )
  return _one_of_a_kind(fitting)


def _one_of_a_kind(
  changes: Sequence[tuple[Change, Counted]],
) -> list[tuple[Change, Counted]]:
  """The first change of each set of keys: three values of one are one idea."""
  found: dict[frozenset[str], tuple[Change, Counted]] = {}
  for change, counted in changes:
    found.setdefault(change.keys, (change, counted))
  return list(found.values())


def changes(config: RunConfig, counted: Counted) -> Iterator[Change]:
  """Changes that may help, one at a time."""
  batch = config.batch
  for factor in (2, 4, 8, 16):
    yield Change(
      overrides=(f"batch.micro_batches={batch.micro_batches * factor}",)
    )
  if config.student.remat != "full":
    yield Change(overrides=("student.remat=full",))
  for factor in (2, 4):
    if batch.chunk_tokens >= 64 * factor:
      yield Change(
        overrides=(f"batch.chunk_tokens={batch.chunk_tokens // factor}",)
      )
  for role, source in (
    ("student", config.student),
    ("teacher", config.teacher),
    ("reference", config.reference),
  ):
    if source is not None and source.compute_dtype == "float32":
      yield Change(
        overrides=(f"{role}.compute_dtype=bfloat16",),
        alters=f"the {role} computes in bfloat16",
      )
  if config.teacher.weight_dtype is None and not config.teacher.offload:
    yield Change(
      overrides=("teacher.weight_dtype=int8",),
      alters="the teacher's kernels are rounded to int8",
    )
  yield from _meshes(counted)
  for key, value in (
    ("batch.prompts", batch.prompts),
    ("batch.rollouts", batch.rollouts),
    ("sampling.max_new_tokens", config.sampling.max_new_tokens),
  ):
    if value > 1 and value % 2 == 0:
      yield Change(overrides=(f"{key}={value // 2}",), alters=f"half of {key}")


def _meshes(counted: Counted) -> Iterator[Change]:
  """Other sizes of fsdp, tensor and context on the same devices."""
  mesh = counted.step.scorer.student.layout.mesh.shape
  devices = mesh["fsdp"] * mesh["tensor"] * mesh["context"]
  sides = [2**power for power in range(devices.bit_length())]
  for tensor, context in itertools.product(sides, sides):
    rest, left = divmod(devices, tensor * context)
    sizes = {**mesh, "fsdp": rest, "tensor": tensor, "context": context}
    if (
      left or rest < 1 or math.prod(sizes.values()) != math.prod(mesh.values())
    ):
      continue
    if sizes != dict(mesh):
      yield Change(
        overrides=tuple(
          f"mesh.{axis}={sizes[axis]}"
          for axis in MESH_AXES
          if sizes[axis] != mesh[axis]
        )
      )
