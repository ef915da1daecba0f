"""The text of an optimised HLO module, as computations of instructions.

What `jax.stages.Compiled.as_text()` prints for TPU, CPU and GPU. Only what the
count of bytes asks for is read: shapes with their layouts, operands, called
computations and the names that JAX gave.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

import numpy as np

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_SHAPE = re.compile(r"([a-z][a-z0-9]*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_BITS = re.compile(r"[a-z]+(\d+)")
_TILE = re.compile(r"T\(([\d,]+)\)")
_SPACE = re.compile(r"S\((\d+)\)")
_CALLED = re.compile(
  r"(?:calls|to_apply|body|condition|true_computation|false_computation"
  r"|branch_computations)=(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_ONE = r"{}=%?([\w.\-]+)"
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_PARTITIONS = re.compile(r"num_partitions=(\d+)")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
  """One array.

  Attributes:
    dtype: as HLO names it.
    sizes: of the dimensions.
    order: dimensions from the fastest to the slowest in memory.
    tile: sizes of the outermost tile; () where the layout has none.
    space: of the memory; 0 is the device's main memory.
  """

  dtype: str
  sizes: tuple[int, ...]
  order: tuple[int, ...]
  tile: tuple[int, ...]
  space: int

  @functools.cached_property
  def elements(self) -> int:
    """Places in memory: dimensions are padded to whole tiles."""
    sizes = list(self.sizes)
    for dimension, tile in zip(self.order, reversed(self.tile), strict=False):
      sizes[dimension] = -(-sizes[dimension] // tile) * tile
    return math.prod(sizes)

  @functools.cached_property
  def bits(self) -> int:
    """Bits of an element."""
    if self.dtype in ("token", "opaque"):
      return 0
    found = _BITS.match(self.dtype)
    return int(found[1]) if found else 8

  @property
  def size(self) -> int:
    """Bytes in memory."""
    return self.elements * self.bits // 8

  @property
  def payload(self) -> int:
    """Bytes without the padding."""
    return math.prod(self.sizes) * self.bits // 8

  @property
  def hbm(self) -> int:
    """Bytes in the device's main memory."""
    return self.size if self.space == 0 else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: unique in the module.
    opcode: "fusion", "dot" and so on.
    shapes: of the result; several of a tuple, flattened.
    operands: names.
    attributes: the text behind the operands.
    payload: the text between the brackets.
  """

  name: str
  opcode: str
  shapes: tuple[Shape, ...]
  operands: tuple[str, ...]
  attributes: str
  payload: str

  @functools.cached_property
  def op_name(self) -> str:
    """The name that JAX gave, with its scopes; "" where it was lost."""
    found = _OP_NAME.search(self.attributes)
    return found[1] if found else ""

  @functools.cached_property
  def called(self) -> tuple[str, ...]:
    """Names of all computations that it calls."""
    names = []
    for several, one in _CALLED.findall(self.attributes):
      names += _NAME.findall(several) if several else [one]
    return tuple(names)

  def called_as(self, role: str) -> str:
    """The computation in one role, such as "body"; "" if there is none."""
    found = re.search(_ONE.format(role), self.attributes)
    return found[1] if found else ""

  @property
  def trips(self) -> int | None:
    """Turns of a loop, where the compiler wrote them down."""
    found = _TRIPS.search(self.attributes)
    return int(found[1]) if found else None

  @property
  def index(self) -> int:
    """Of a parameter, or of the element that is taken of a tuple."""
    if self.opcode == "parameter":
      return int(self.payload)
    found = re.search(r"index=(\d+)", self.attributes)
    return int(found[1]) if found else 0


@dataclasses.dataclass(frozen=True)
class Computation:
  """A function of the module.

  Attributes:
    name: unique in the module.
    instructions: by name, in order.
    root: name of the result.
  """

  name: str
  instructions: Mapping[str, Instruction]
  root: str

  @functools.cached_property
  def parameters(self) -> Mapping[int, Instruction]:
    """By index."""
    return {
      instruction.index: instruction
      for instruction in self.instructions.values()
      if instruction.opcode == "parameter"
    }

  @functools.cached_property
  def users(self) -> Mapping[str, tuple[Instruction, ...]]:
    """The instructions that take each as an operand."""
    users: dict[str, list[Instruction]] = {}
    for instruction in self.instructions.values():
      for operand in dict.fromkeys(instruction.operands):
        users.setdefault(operand, []).append(instruction)
    return {name: tuple(found) for name, found in users.items()}


@dataclasses.dataclass(frozen=True)
class Module:
  """A program of one device.

  Attributes:
    computations: by name.
    entry: the one that runs.
    partitions: devices that run it together.
  """

  computations: Mapping[str, Computation]
  entry: Computation
  partitions: int


def parse(text: str) -> Module:
  """Reads a module.

  Raises:
    ValueError: the text has no entry computation.
  """
  computations: dict[str, Computation] = {}
  entry = None
  name, body, root, is_entry = "", None, "", False
  for line in text.splitlines():
    if body is None:
      found = _HEADER.match(line)
      if found:
        name, body, root, is_entry = found[2], {}, "", bool(found[1])
      continue
    if line.startswith("}"):
      computations[name] = Computation(name, body, root)
      entry = computations[name] if is_entry else entry
      body = None
      continue
    found = _INSTRUCTION.match(line)
    if found:
      instruction = _instruction(found[2], line[found.end() :])
      body[instruction.name] = instruction
      root = instruction.name if found[1] else root
  if entry is None:
    raise ValueError("the text has no ENTRY computation; is it optimised HLO?")
  partitions = _PARTITIONS.search(text)
  return Module(computations, entry, int(partitions[1]) if partitions else 1)


def _instruction(name: str, text: str) -> Instruction:
  """What follows "name = "."""
  if text.startswith("("):
    end = _closing(text, 0) + 1
  else:
    end = text.index(" ")
  opening = text.index("(", end)
  closing = _closing(text, opening)
  payload = text[opening + 1 : closing]
  opcode = text[end:opening].strip()
  return Instruction(
    name=name,
    opcode=opcode,
    shapes=tuple(_shapes(text[:end])),
    operands=tuple(_NAME.findall(payload)),
    attributes=text[closing + 1 :],
    payload=payload,
  )


def _closing(text: str, opening: int) -> int:
  """Where the bracket that opens here is closed."""
  depth = 0
  for place in range(opening, len(text)):
    depth += {"(": 1, ")": -1}.get(text[place], 0)
    if depth == 0:
      return place
  raise ValueError(f"a bracket is never closed in: {text[:80]}")


def _shapes(text: str) -> list[Shape]:
  return [_shape(*found) for found in _SHAPE.findall(text)]


@functools.lru_cache(maxsize=4096)
def _shape(dtype: str, sizes: str, layout: str) -> Shape:
  order, _, rest = layout.partition(":")
  tile, space = _TILE.search(rest), _SPACE.search(rest)
  # The bound of a dimension of dynamic size is written "<=n".
  numbers = tuple(int(n.lstrip("<=")) for n in sizes.split(",") if n)
  return Shape(
    dtype=dtype,
    sizes=numbers,
    order=tuple(int(n) for n in order.split(",") if n)
    or tuple(reversed(range(len(numbers)))),
    tile=tuple(int(n) for n in tile[1].split(",")) if tile else (),
    space=int(space[1]) if space else 0,
  )


def group(attributes: str, partitions: int) -> tuple[int, ...]:
  """The devices of the first group that communicates."""
  if found := re.search(r"source_target_pairs=\{\{(\d+),(\d+)", attributes):
    return int(found[1]), int(found[2])
  if found := re.search(r"replica_groups=\{\{([\d,]+)", attributes):
    return tuple(int(n) for n in found[1].split(","))
  if found := re.search(
    r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?",
    attributes,
  ):
    sizes = [int(n) for n in found[3].split(",")]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    if found[4]:
      ids = ids.transpose([int(n) for n in found[4].split(",")])
    return tuple(ids.reshape(int(found[1]), int(found[2]))[0].tolist())
  if found := re.search(
    r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes
  ):
    sizes = {n: int(s) for n, s in re.findall(r"'(\w+)'=(\d+)", found[1])}
    stride, ids = math.prod(sizes.values()), np.zeros(1, int)
    # A part of an axis is written 'name':(size of what is before it)size.
    chosen = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", found[2])
    parts = {name: (before, size) for name, before, size in chosen}
    for name, size in sizes.items():
      stride //= size
      if name in parts:
        before, part = (int(n) if n else 0 for n in parts[name])
        step = stride * (size // (before * part) if part else 1)
        steps = step * np.arange(part or size)
        ids = (ids[:, None] + steps).ravel()
    return tuple(ids.tolist())
  return tuple(range(partitions))
