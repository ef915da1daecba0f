"""What a compiled program moves: bytes and collectives, loop by loop.

Counted from the optimised HLO text, so from the program that will run. Of each
operation the arrays in the device's main memory (HBM) count that it reads or
writes, with the padding of their tiles:

  - a fusion or a slice reads the slice that it takes, not the whole array;
  - a `dynamic-update-slice` in place writes the slice that it sets;
  - what the compiler placed in on-chip memory (VMEM) moves nothing, the copy
    there reads once;
  - bitcasts, tuples, constants and indices move nothing;
  - of branches the costliest runs.

Not seen: what a custom call (a Pallas kernel) does inside; it counts as reading
its operands and writing its results once.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from opd_jax.plan import fusions
from opd_jax.plan.hlo_text import (
  Computation,
  Instruction,
  Module,
  group,
  parse,
)
from opd_jax.plan.traffic import Collective, Loop, Operation, Read

COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "all-to-all",
  "collective-broadcast",
  "collective-permute",
  "ragged-all-to-all",
  "reduce-scatter",
)

# What passes an array on to a neighbour: turns of it gather a weight too.
_PASSES = (
  "collective-permute",
  "collective-permute-start",
  "collective-permute-done",
)

_FREE = {"add-dependency", "after-all", "partition-id", "replica-id"}
# Custom calls that are no work.
_FREE_CALLS = (
  "AllocateBuffer",
  "AssumeGatherIndicesInBound",
  "ConcatBitcast",
  "Sharding",
)
# A value of so few elements is an index, or as cheap as one.
_FEW = 16

_SCOPE = re.compile(r"(?:[^/\"(]|\((?:[^()]|\([^()]*\))*\))+")
_NO_SCOPE = re.compile(r"(jit\(|pjit\(|(closed_call|while|body|cond)$)")


def analyse(text: str) -> Loop:
  """The program as a tree of loops.

  Args:
    text: of the optimised module: `compiled.as_text()`, or a dump.

  Raises:
    ValueError: the text is no optimised HLO module.
  """
  module = parse(text)
  arguments = {
    index: _Array(name=parameter.name, fixed=True)
    for index, parameter in module.entry.parameters.items()
  }
  return _Body(module, module.entry, arguments).loop(
    scope="", name="", turns=1, carried=frozenset(_names(arguments.values()))
  )


def scope_of(op_name: str) -> str:
  """The scopes of a JAX name, without what its loops and calls add."""
  names = _SCOPE.findall(op_name)
  return "/".join(name for name in names if not _NO_SCOPE.match(name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Array:
  """Where the value of an instruction lies.

  Attributes:
    name: of the memory.
    fixed: no loop around it changes it.
    number: its value, if it is a constant integer.
  """

  name: str
  fixed: bool
  number: int | None = None


# A tuple where the instruction's value is one.
_Value = _Array | tuple["_Value", ...]


def _arrays(value: _Value) -> Iterator[_Array]:
  if isinstance(value, _Array):
    yield value
  else:
    for part in value:
      yield from _arrays(part)


def _names(values: Iterable[_Value]) -> Iterator[str]:
  return (array.name for value in values for array in _arrays(value))


def _element(value: _Value, index: int) -> _Value:
  return value[index] if isinstance(value, tuple) else value


def _changing(value: _Value, *, fixed: bool = False) -> _Value:
  """The same memory, of which every turn makes something else.

  Args:
    value: where it lies.
    fixed: what it makes is what the neighbours have, so it stays a weight.
  """
  if isinstance(value, _Array):
    return dataclasses.replace(value, fixed=fixed and value.fixed, number=None)
  return tuple(_changing(part, fixed=fixed) for part in value)


class _Body:
  """What one turn of a computation does, its arguments being known."""

  def __init__(
    self,
    module: Module,
    computation: Computation,
    arguments: Mapping[int, _Value],
  ):
    self.module = module
    self.computation = computation
    self.values: dict[str, _Value] = {}
    self.operations: list[Operation] = []
    self.collectives: list[Collective] = []
    self.loops: list[Loop] = []
    for instruction in computation.instructions.values():
      self.values[instruction.name] = (
        arguments[instruction.index]
        if instruction.opcode == "parameter"
        else self._run(instruction)
      )

  def loop(
    self, *, scope: str, name: str, turns: int | None, carried: frozenset[str]
  ) -> Loop:
    return Loop(
      scope=scope,
      name=name,
      turns=turns,
      operations=tuple(self.operations),
      collectives=tuple(self.collectives),
      loops=tuple(self.loops),
      carried=carried,
    )

  def _run(self, instruction: Instruction) -> _Value:
    """Notes what an instruction does, and says where its value lies."""
    operands = [self.values[name] for name in instruction.operands]
    match instruction.opcode:
      case "constant":
        text = instruction.payload
        number = int(text) if text.lstrip("-").isdigit() else None
        return _Array(name=instruction.name, fixed=True, number=number)
      case "tuple":
        return tuple(operands)
      case "get-tuple-element":
        return _element(operands[0], instruction.index)
      case "bitcast" | "opt-barrier" | "optimization-barrier":
        return operands[0]
      case "while":
        return self._while(instruction, operands[0])
      case "call":
        return self._call(instruction, operands)
      case "async-start" if operands:
        return self._call(instruction, operands)
      case "async-update" if len(operands) > 1:
        # Started without operands; they come with the update.
        start = self.computation.instructions[instruction.operands[0]]
        return self._call(start, operands[1:])
      case "async-start":
        return _Array(name=instruction.name, fixed=False)
      case "conditional":
        return self._conditional(instruction, operands)
      case "copy-done" | "async-done" | "async-update":
        return operands[0]
      case _:
        return self._operation(instruction, operands)

  def _while(self, instruction: Instruction, start: _Value) -> _Value:
    body, condition = (
      self.module.computations[instruction.called_as(role)]
      for role in ("body", "condition")
    )
    changed, passed = _changed(body)
    arguments = tuple(
      _changing(part, fixed=index in passed) if index in changed else part
      for index, part in enumerate(start if isinstance(start, tuple) else ())
    )
    found = _Body(self.module, body, {0: arguments})
    turns = instruction.trips
    if turns is None:
      turns = _turns(self.module, condition, body, start)
    self.loops.append(
      found.loop(
        scope=scope_of(instruction.op_name),
        name=instruction.name,
        turns=turns,
        carried=frozenset(_names([start])),
      )
    )
    return arguments

  def _call(
    self, instruction: Instruction, operands: Sequence[_Value]
  ) -> _Value:
    computation = self.module.computations[instruction.called[0]]
    inner = _Body(self.module, computation, dict(enumerate(operands)))
    self._take(inner)
    return inner.values[computation.root]

  def _conditional(
    self, instruction: Instruction, operands: Sequence[_Value]
  ) -> _Value:
    bodies = [
      _Body(self.module, self.module.computations[name], {0: operand})
      for name, operand in zip(instruction.called, operands[1:], strict=True)
    ]
    whole = lambda body: body.loop(
      scope="", name="", turns=1, carried=frozenset()
    ).bytes_per_turn()
    costliest = max(bodies, key=whole)
    self._take(costliest)
    return costliest.values[costliest.computation.root]

  def _take(self, inner: "_Body") -> None:
    self.operations += inner.operations
    self.collectives += inner.collectives
    self.loops += inner.loops

  def _operation(
    self, instruction: Instruction, operands: Sequence[_Value]
  ) -> _Value:
    """An operation that computes or copies."""
    opcode = instruction.opcode
    # An index, of a layer say, does not make other data of what is taken.
    data = [n for n in instruction.operands if not self._is_scalar(n)]
    fixed = all(
      array.fixed
      for name in data or instruction.operands
      for array in _arrays(self.values[name])
    )
    # A collective inside a fusion, or wrapped to run beside other work.
    self.collectives += _collectives(
      self.module, self.computation, instruction, fixed
    )
    numbers = {array.number for o in operands for array in _arrays(o)}
    new = _Array(
      name=instruction.name,
      fixed=fixed,
      number=numbers.pop() if opcode in ("copy", "copy-start") else None,
    )
    if opcode in _FREE or opcode.endswith("-done"):
      return new
    if opcode == "custom-call" and any(
      f'"{name}"' in instruction.attributes for name in _FREE_CALLS
    ):
      return new
    taken = {
      name: self._read(instruction, name, size)
      for name in dict.fromkeys(instruction.operands)
      if (size := self._size(name)) and not self._is_scalar(name)
    }
    reads = tuple(
      Read(array=array.name, bytes=size, whole=self._size(name))
      for name, size in taken.items()
      if size
      for array in itertools.islice(_arrays(self.values[name]), 1)
    )
    written, updated, results = 0, 0, []
    for shape, target, part in fusions.results(
      self.module, self.computation, instruction
    ):
      if target is None:
        written += shape.hbm if math.prod(shape.sizes) > _FEW else 0
        results.append(new)
      else:
        updated += part if shape.space == 0 else 0
        (base, *_) = _arrays(operands[target])
        results.append(dataclasses.replace(base, fixed=False, number=None))
    if reads or written or updated:
      self.operations.append(
        Operation(
          name=instruction.name,
          opcode=opcode,
          source=instruction.op_name,
          reads=reads,
          written=written,
          updated=updated,
        )
      )
    return tuple(results) if len(results) > 1 else results[0]

  def _read(self, instruction: Instruction, name: str, whole: int) -> int:
    """Bytes that an operation reads of an operand of `whole` bytes."""
    opcode = instruction.opcode.removesuffix("-start")
    if opcode in fusions.SETS and name == instruction.operands[0]:
      return 0
    if opcode in fusions.TAKES or opcode == "fusion":
      return fusions.taken(
        self.module, self.computation, instruction, name, whole
      )
    return whole

  def _size(self, name: str) -> int:
    """Bytes of a value in HBM."""
    shapes = self.computation.instructions[name].shapes
    return sum(shape.hbm for shape in shapes)

  def _is_scalar(self, name: str) -> bool:
    """Whether a value is a number or a few: an index, not data."""
    shapes = self.computation.instructions[name].shapes
    return sum(math.prod(shape.sizes) for shape in shapes) <= _FEW


def _collectives(
  module: Module,
  computation: Computation,
  instruction: Instruction,
  fixed: bool,
) -> Iterator[Collective]:
  """Of an operation, and of what is fused into it."""
  if instruction.opcode == "fusion":
    inner = module.computations[instruction.called[0]]
    for part in inner.instructions.values():
      yield from _collectives(module, inner, part, fixed)
  kind = instruction.opcode.removesuffix("-start")
  if kind not in COLLECTIVES:
    return
  devices = group(instruction.attributes, module.partitions)
  operands = (computation.instructions[n] for n in instruction.operands)
  payload = sum(shape.payload for o in operands for shape in o.shapes)
  yield Collective(
    kind=kind,
    name=instruction.name,
    source=instruction.op_name,
    payload=payload * (len(devices) if kind == "all-gather" else 1),
    devices=devices,
    weights=fixed,
  )


def _changed(body: Computation) -> tuple[set[int], set[int]]:
  """Elements of a loop's tuple that a turn does not hand on as they are.

  And those of them that it passes around a ring of devices.
  """
  root = body.instructions[body.root]
  changed, passed = set(), set()
  for index, name in enumerate(root.operands):
    value, sent = body.instructions[name], False
    while value.opcode in (*fusions.SAME, "copy", *_PASSES):
      sent = sent or value.opcode in _PASSES
      value = body.instructions[value.operands[0]]
    handed_on = (
      value.opcode == "get-tuple-element"
      and value.index == index
      and body.instructions[value.operands[0]].opcode == "parameter"
    )
    if sent or not handed_on:
      changed.add(index)
    if sent and handed_on:
      passed.add(index)
  return changed, passed


def _turns(
  module: Module, condition: Computation, body: Computation, start: _Value
) -> int | None:
  """How often a loop runs at most that counts to a constant; None if unknown.

  A counter whose start cannot be seen starts at 0, one whose step cannot be
  seen goes by 1.
  """
  found = []
  root = body.instructions[body.root]
  for counter, bound in _bounds(module, condition, condition.root, ()):
    last = _number(bound, start)
    if counter.opcode != "get-tuple-element" or last is None:
      continue
    step = 1
    advance = body.instructions[root.operands[counter.index]]
    if advance.opcode == "add":
      added = (_number(body.instructions[n], start) for n in advance.operands)
      step = next((n for n in reversed([*added]) if n), 1)
    first = _number(counter, start) or 0
    found.append(max(0, -(-(last - first) // step)))
  return min(found, default=None)


def _bounds(
  module: Module,
  computation: Computation,
  name: str,
  operands: Sequence[Instruction],
) -> Iterator[tuple[Instruction, Instruction]]:
  """Pairs of which the first must be less than the second for a loop to go on.

  Args:
    module: the program.
    computation: the condition, or a fusion in it.
    name: of a boolean.
    operands: of the fusion.
  """

  def look(name: str) -> Instruction:
    value = computation.instructions[name]
    while value.opcode in fusions.SAME:
      value = computation.instructions[value.operands[0]]
    if value.opcode == "parameter" and operands:
      return operands[value.index]
    return value

  value = look(name)
  if value.opcode == "and":
    for operand in value.operands:
      yield from _bounds(module, computation, operand, operands)
  elif value.opcode == "fusion":
    inner = module.computations[value.called[0]]
    outer = [look(operand) for operand in value.operands]
    yield from _bounds(module, inner, inner.root, outer)
  elif value.opcode == "compare" and "direction=LT" in value.attributes:
    smaller, larger = (look(operand) for operand in value.operands)
    yield smaller, larger


def _number(value: Instruction, start: _Value) -> int | None:
  """Of a constant, or of an element that a loop starts with."""
  if value.opcode == "constant":
    return int(value.payload) if value.payload.isdigit() else None
  if value.opcode == "get-tuple-element":
    array = _element(start, value.index)
    return array.number if isinstance(array, _Array) else None
  return None
