"""Names of TPU slices and GPU machines, and devices of slices nobody owns.

A slice is named by its generation and shape in chips, `v5p:4x4x4`, or as Cloud
TPU names it, `v5p-128`. The number there counts

  v4, v5p, tpu7x    TensorCores, two a chip
  v5e, v6e          chips (v5e is also spelled v5litepod)

A program has one device per chip; on tpu7x one per TensorCore, with half of the
chip's memory. `2*v5e:16x16` is two slices, joined by the data-centre network.
GPU machines are named by how many there are and the GPUs in each, at most 8:
`h100:2x8`.
"""

import contextlib
import dataclasses
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from opd_jax.chips import CHIPS, Chip
from opd_jax.errors import InputError

# Shapes in chips that a slice may have, smallest first. Larger ones of the
# three-dimensional generations have sides that are multiples of four.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
  *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
  *("8x8x16", "8x16x16", "16x16x16"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Generation:
  """How slices of a TPU generation are named.

  Attributes:
    shapes: those that a number alone stands for.
    counted: units of that number in a chip.
    options: of the TPU library, beside the name.
    spelled: other spellings of the generation.
  """

  shapes: tuple[str, ...]
  counted: int = 1
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  spelled: tuple[str, ...] = ()


_TPUS: Mapping[str, _Generation] = {
  "v4": _Generation(
    shapes=_CUBES,
    counted=2,
    # Both cores of a chip as one device, as Cloud TPU runs them.
    options={"chip_config_name": "megacore"},
  ),
  "v5e": _Generation(shapes=_FLAT, spelled=("v5litepod",)),
  "v5p": _Generation(shapes=_CUBES, counted=2),
  "v6e": _Generation(shapes=_FLAT),
  "tpu7x": _Generation(shapes=("1x1x1", *_CUBES), counted=2),
}
_GPUS = ("a100", "h100", "h200")

_NAME = re.compile(r"(?:(\d+)\*)?([a-z0-9]+)(?::([\dx]+)|-(\d+))")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
  """Devices that a program is compiled, or counted, for.

  Attributes:
    generation: of the chips, such as "v5p" or "h100".
    shape: of a slice, in chips; (machines, GPUs in each) for GPUs.
    slices: joined by the data-centre network.
  """

  generation: str
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def name(self) -> str:
    """Such as "v5p:4x4x4" or "2*v5e:16x16"."""
    slices = f"{self.slices}*" if self.slices > 1 else ""
    return f"{slices}{self.generation}:{'x'.join(map(str, self.shape))}"

  @property
  def is_tpu(self) -> bool:
    """Whether there is a compiler for it without the device."""
    return self.generation in _TPUS

  @property
  def chips(self) -> int:
    """Of all slices."""
    return self.slices * math.prod(self.shape)

  @property
  def islands(self) -> int:
    """Slices, or machines of GPUs, between which the network is slow."""
    return self.slices if self.is_tpu else self.shape[0]

  @property
  def devices(self) -> int:
    """That a program sees, in all slices."""
    return self.chips * self.device.per_chip

  @property
  def device(self) -> Chip:
    """What its makers say of a device."""
    return CHIPS[self.generation]


def parse(text: str, slices: int | None = None) -> Topology:
  """The topology of a name; see the module.

  Args:
    text: such as "v5p:4x4x4", "v5p-128" or "h100:8".
    slices: in place of the number that the name says.

  Raises:
    InputError: an unknown generation or shape.
  """
  found = _NAME.fullmatch(text.strip().lower())
  if found is None:
    raise InputError(_unknown(text))
  count, generation, shape, number = found.groups()
  for name, known in _TPUS.items():
    if generation in known.spelled:
      generation = name
  if generation in _GPUS:
    sides = _sides(shape or number)
    if len(sides) == 1:
      sides = (1, *sides)
    if len(sides) != 2:
      raise InputError(_unknown(text))
    most, gpus = CHIPS[generation].per_host, math.prod(sides)
    if gpus == 0 or sides[1] > most:
      machines = max(math.ceil(gpus / most), 1)
      raise InputError(
        f"no topology {text!r}: a machine has 1 to {most} GPUs, and several "
        f"are MACHINESxGPUS, such as {generation}:{machines}x{most}"
      )
  elif generation in _TPUS:
    known = _TPUS[generation]
    if shape is None:
      shape = _shape_of(text, known, int(number))
    sides = _sides(shape)
    if not _exists(known, sides):
      raise InputError(_unknown(text))
  else:
    raise InputError(_unknown(text))
  if slices is None:
    slices = int(count or 1)
  if slices < 1 or (slices > 1 and generation in _GPUS):
    raise InputError(
      f"{slices} slices of {text}: the number of slices must be at least 1, "
      "and is of TPUs; several GPU machines are one topology, such as h100:2x8"
    )
  return Topology(generation=generation, shape=sides, slices=slices)


def _sides(shape: str) -> tuple[int, ...]:
  return tuple(int(side) for side in shape.split("x") if side)


def _shape_of(text: str, generation: _Generation, number: int) -> str:
  """The usual shape of so many chips or cores."""
  for shape in generation.shapes:
    if math.prod(_sides(shape)) * generation.counted == number:
      return shape
  raise InputError(_unknown(text))


def _exists(generation: _Generation, sides: tuple[int, ...]) -> bool:
  named = {tuple(sorted(_sides(shape))) for shape in generation.shapes}
  if tuple(sorted(sides)) in named:
    return True
  largest = _sides(generation.shapes[-1])
  return (
    len(sides) == len(largest) == 3
    and all(side > 0 and side % 4 == 0 for side in sides)
    and math.prod(sides) <= 6144
  )


def _unknown(text: str) -> str:
  """Says what a topology may be."""
  known = []
  for name, generation in _TPUS.items():
    shapes = ", ".join(
      f"{shape} ({name}-{math.prod(_sides(shape)) * generation.counted})"
      for shape in generation.shapes
    )
    more = ", or sides that are multiples of 4" if "4x4x8" in shapes else ""
    known.append(f"{name}: {shapes}{more}")
  gpus = ", ".join(f"{name}:8 or {name}:2x8" for name in _GPUS)
  return (
    f"no topology {text!r}; write GENERATION:SHAPE in chips, or GENERATION-N "
    f"as Cloud TPU does; there are {'; '.join(known)}; and GPU machines {gpus} "
    "(machines x GPUs)"
  )


def devices(topology: Topology) -> list[Any]:
  """Devices of a TPU slice that need not exist, to compile for.

  Raises:
    InputError: the TPU library is missing, or does not know the slice.
  """
  # Read by the library when it is loaded: ask no metadata server, and share
  # the machine with other programs, none of which has a TPU here.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  import jax
  from jax.experimental import topologies

  shape = "x".join(map(str, topology.shape))
  options = dict(_TPUS[topology.generation].options)
  if topology.slices > 1:
    options["num_slices"] = topology.slices
  try:
    found = topologies.get_topology_desc(
      platform="tpu",
      topology_name=f"{topology.generation}:{shape}",
      **options,
    )
  except (jax.errors.JaxRuntimeError, RuntimeError, ImportError) as error:
    raise InputError(
      f"cannot compile for {topology.name}: {_first_line(error)}; if libtpu is "
      'missing, pip install "opd-jax[plan]"; --analytic counts without it'
    ) from error
  return list(found.devices)


def _first_line(error: Exception) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Keeps what the TPU library writes on standard error from the user.

  It writes to the file descriptor; what Python writes still arrives.
  """
  sys.stderr.flush()
  kept, python = os.dup(2), sys.stderr
  with tempfile.TemporaryFile() as noise, os.fdopen(kept, "w") as shown:
    os.dup2(noise.fileno(), 2)
    sys.stderr = shown
    try:
      yield
    finally:
      shown.flush()
      sys.stderr = python
      os.dup2(kept, 2)
