"""What an operation reads of its operands, and where it writes its results.

A fusion is looked into: it may take a slice of an operand and no more, or set a
slice of one in place.
"""

from opd_jax.plan.hlo_text import Computation, Instruction, Module, Shape

# What hands an array on as it is, to see where it comes from or goes.
SAME = {"bitcast", "opt-barrier", "optimization-barrier", "reshape"}
_CAST = {"convert", "copy", "transpose"}
TAKES = {"dynamic-slice", "gather", "slice"}
# What sets a part of its first operand, and the operand that is set.
SETS = {"dynamic-update-slice": 1, "scatter": 2}


def taken(
  module: Module,
  computation: Computation,
  user: Instruction,
  name: str,
  whole: int,
  partly_set: bool = False,
) -> int:
  """Bytes that a user reads of an array of `whole` bytes."""
  first = user.operands.index(name) == 0
  opcode = user.opcode.removesuffix("-start")
  shape = computation.instructions[name].shapes[0]
  if opcode in TAKES and first and user.operands.count(name) == 1:
    # Of an asynchronous slice the result is behind the operand.
    result = user.shapes[1 if user.opcode.endswith("-start") else 0]
    return min(whole, result.elements * shape.bits // 8)
  if opcode in SETS and first:
    return _used(module, computation, user, whole, True)
  if opcode in SAME or (opcode in _CAST and not partly_set):
    return _used(module, computation, user, whole, partly_set)
  if opcode == "tuple" and partly_set:
    return 0
  if opcode == "fusion":
    inner = module.computations[user.called[0]]
    parameters = (
      inner.parameters[index]
      for index, operand in enumerate(user.operands)
      if operand == name
    )
    return min(whole, sum(_used(module, inner, p, whole) for p in parameters))
  return whole


def _used(
  module: Module,
  computation: Computation,
  value: Instruction,
  whole: int,
  partly_set: bool = False,
) -> int:
  """Bytes of `whole` that all users of a value inside a fusion read."""
  if value.name == computation.root:
    return 0 if partly_set else whole
  users = computation.users.get(value.name, ())
  return min(
    whole,
    sum(
      taken(module, computation, user, value.name, whole, partly_set)
      for user in users
    ),
  )


def results(
  module: Module, computation: Computation, instruction: Instruction
) -> list[tuple[Shape, int | None, int]]:
  """Shapes; operands that are set in place, or None; bytes that are set."""
  opcode, shapes = instruction.opcode, instruction.shapes
  if opcode == "fusion":
    inner = module.computations[instruction.called[0]]
    root = inner.instructions[inner.root]
    roots = root.operands if root.opcode == "tuple" else (root.name,)
    if len(roots) == len(shapes):
      found = [_set_in_place(module, inner, name) for name in roots]
      return [(s, *f) for s, f in zip(shapes, found, strict=True)]
  if opcode in SETS:
    part = computation.instructions[instruction.operands[SETS[opcode]]]
    return [(shapes[0], 0, part.shapes[0].size)]
  if opcode == "copy-start":
    shapes = shapes[:1]
  elif opcode.endswith("-start") and len(shapes) > 1:
    shapes = shapes[1:2]
  return [(shape, None, 0) for shape in shapes]


def _set_in_place(
  module: Module, computation: Computation, name: str
) -> tuple[int | None, int]:
  """The parameter that a result of a fusion is, but for bytes that are set."""
  value, part = computation.instructions[name], 0
  while value.opcode in SAME or value.opcode in SETS:
    if value.opcode in SETS:
      update = value.operands[SETS[value.opcode]]
      part += computation.instructions[update].shapes[0].size
    value = computation.instructions[value.operands[0]]
  if value.opcode == "fusion":
    inner = module.computations[value.called[0]]
    index, inner_part = _set_in_place(module, inner, inner.root)
    if index is not None:
      operand = value.operands[index]
      index, more = _set_in_place(module, computation, operand)
      return index, part + inner_part + more
  if value.opcode == "parameter" and part:
    return value.index, part
  return None, 0
