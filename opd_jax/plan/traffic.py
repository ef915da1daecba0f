"""Bytes and collectives of a compiled program, loop by loop.

What `hlo.analyse` finds; everything is of one device.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Read:
  """Bytes that an operation reads of one array.

  Attributes:
    array: a name for the memory, the same through loops and updates in place.
    bytes: that are read, in HBM.
    whole: bytes of the whole array.
  """

  array: str
  bytes: int
  whole: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation:
  """One operation, run once.

  Attributes:
    name: of the instruction.
    opcode: "fusion", "copy" and so on.
    source: the name that JAX gave, with its scopes; "" where it was lost.
    reads: from HBM.
    written: bytes of new arrays in HBM.
    updated: bytes of slices that are set in place.
  """

  name: str
  opcode: str
  source: str
  reads: tuple[Read, ...]
  written: int
  updated: int

  @property
  def bytes(self) -> int:
    """All of it."""
    return sum(r.bytes for r in self.reads) + self.written + self.updated


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
  """One collective, run once.

  Attributes:
    kind: one of `COLLECTIVES`.
    name: of the instruction.
    source: the name that JAX gave.
    payload: bytes, of the whole result of an all-gather, of the operands of the
      others.
    devices: numbers, in the order of the mesh, of a group that communicates.
    weights: an array that the program was given, or that was made of it before
      any loop, is what travels.
  """

  kind: str
  name: str
  source: str
  payload: int
  devices: tuple[int, ...]
  weights: bool = False

  def axes(self, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the group lies.

    Args:
      mesh: sizes of the axes, in their order.
    """
    found, stride = [], math.prod(mesh.values())
    for name, size in mesh.items():
      stride //= size
      if len({device // stride % size for device in self.devices}) > 1:
        found.append(name)
    return tuple(found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Move:
  """What an operation moves in a turn of a loop, all its runs together.

  Attributes:
    operation: the operation.
    runs: in the turn.
    bytes: read and written.
    excess: of them those beyond reading each array from before the turn once
      and setting slices: temporaries that are written and read again, and
      arrays that are read more than once.
  """

  operation: Operation
  runs: int
  bytes: int
  excess: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
  """The body of a loop, or the program.

  Attributes:
    scope: names that JAX gave around it, joined by "/".
    name: of the instruction; "" for the program.
    turns: at most, since a condition may end it early; 1 for the program, None
      where the condition has no bound.
    operations: of one turn, without those of the loops inside.
    collectives: likewise.
    loops: inside it.
    carried: names of arrays that were there before the turn.
  """

  scope: str
  name: str
  turns: int | None
  operations: tuple[Operation, ...]
  collectives: tuple[Collective, ...]
  loops: tuple["Loop", ...]
  carried: frozenset[str]

  def walk(self) -> Iterator["Loop"]:
    """This loop, then those inside, outer before inner."""
    yield self
    for loop in self.loops:
      yield from loop.walk()

  def find(self, scope: str) -> "Loop | None":
    """The outermost loop inside a scope; None where there is none."""
    for loop in self.walk():
      if scope in loop.scope.split("/"):
        return loop
    return None

  def turn(self) -> Iterator[tuple[Operation, int]]:
    """Operations with how often they run in one turn of this loop.

    Those of loops inside come first; of a loop whose number of turns is not
    known one turn counts.
    """
    for loop in self.loops:
      for operation, runs in loop.turn():
        yield operation, runs * (loop.turns or 1)
    yield from ((operation, 1) for operation in self.operations)

  def turn_collectives(self) -> Iterator[tuple[Collective, int]]:
    """As `turn`, for collectives."""
    yield from ((collective, 1) for collective in self.collectives)
    for loop in self.loops:
      for collective, runs in loop.turn_collectives():
        yield collective, runs * (loop.turns or 1)

  def bytes_per_turn(self) -> int:
    """HBM bytes that one turn reads and writes."""
    return sum(operation.bytes * runs for operation, runs in self.turn())

  def moves(self) -> list[Move]:
    """The operations of a turn, those with the most excess first."""
    read: dict[str, int] = {}
    moves = []
    for operation, runs in self.turn():
      excess = operation.written * runs
      for part in operation.reads:
        size, before = part.bytes * runs, read.get(part.array, 0)
        read[part.array] = before + size
        due = part.whole if part.array in self.carried else 0
        excess += size - max(0, min(size, due - before))
      total = operation.bytes * runs
      moves.append(
        Move(operation=operation, runs=runs, bytes=total, excess=excess)
      )
    return sorted(moves, key=lambda move: (-move.excess, -move.bytes))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """What a part of a program moves in one run.

  Attributes:
    bytes: read from and written to HBM.
    collectives: with how often they run.
  """

  bytes: int
  collectives: tuple[tuple[Collective, int], ...]


def by_part(program: Loop, part_of: Callable[[str], str]) -> dict[str, Part]:
  """A program's operations, sorted into parts.

  Args:
    program: of `hlo.analyse`.
    part_of: a part's name from the name that JAX gave an operation.
  """
  moved: dict[str, int] = {}
  for operation, runs in program.turn():
    name = part_of(operation.source)
    moved[name] = moved.get(name, 0) + operation.bytes * runs
  sent: dict[str, list[tuple[Collective, int]]] = {}
  for collective, runs in program.turn_collectives():
    sent.setdefault(part_of(collective.source), []).append((collective, runs))
  return {
    name: Part(bytes=moved.get(name, 0), collectives=tuple(sent.get(name, ())))
    for name in dict.fromkeys((*moved, *sent))
  }
