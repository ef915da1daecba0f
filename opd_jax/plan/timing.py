"""How long a step would take: a roofline with an interconnect.

    seconds = max(operations / peak, HBM bytes / bandwidth) + interconnect

of each phase, on the busiest device. It is a floor, not a forecast: matrix
units and memory reach their peaks only in large shapes, and nothing here knows
of kernels that are launched, hosts that are waited for, or rows that end early.
The interconnect is added, not hidden behind the work; compilers hide part of
it.

Operations are counted from the models (`flops`), those of a recomputed forward
pass included. Bytes and collectives come from the compiled program (`measured`)
or, without one, from shapes (`estimated`).
"""

import dataclasses
import math
from collections.abc import Collection, Mapping

import jax

from opd_jax import flops
from opd_jax.chips import Chip
from opd_jax.memory.drawing import cache, decode_copy
from opd_jax.memory.parts import frozen, itemsize, shard_bytes, share
from opd_jax.models import Model
from opd_jax.plan.traffic import Collective, Loop, by_part
from opd_jax.step import Step

PHASES = ("sample", "score", "update")

# Seconds for a message to reach a neighbour, which short messages cannot hide.
HOP = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """What one device does in a phase.

  Attributes:
    operations: floating-point operations.
    hbm: bytes read and written.
    links: bytes sent to devices of the same slice or box.
    network: bytes sent to other slices or boxes.
    hops: neighbours passed, one after the other, by all collectives together.
  """

  operations: float = 0.0
  hbm: float = 0.0
  links: float = 0.0
  network: float = 0.0
  hops: float = 0.0

  def __add__(self, other: "Work") -> "Work":
    return Work(
      **{
        field.name: getattr(self, field.name) + getattr(other, field.name)
        for field in dataclasses.fields(Work)
      }
    )

  def times(self, count: float) -> "Work":
    """The same, `count` times."""
    return Work(
      **{
        field.name: getattr(self, field.name) * count
        for field in dataclasses.fields(Work)
      }
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
  """Seconds of a phase, by what takes them."""

  name: str
  compute: float
  memory: float
  interconnect: float

  @property
  def seconds(self) -> float:
    """Compute and memory overlap; the interconnect is added."""
    return max(self.compute, self.memory) + self.interconnect

  @property
  def bound(self) -> str:
    """What takes the most: "compute", "memory" or "interconnect"."""
    return max(
      ("compute", "memory", "interconnect"),
      key=lambda name: getattr(self, name),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
  """A step.

  Attributes:
    phases: in order.
    tokens: completion tokens of a step, over all devices.
    chips: that run it, as they are sold.
  """

  phases: tuple[Phase, ...]
  tokens: float
  chips: float

  @property
  def seconds(self) -> float:
    """Of the step."""
    return sum(phase.seconds for phase in self.phases)

  @property
  def shares(self) -> Mapping[str, float]:
    """The fraction of the time by phase."""
    return {
      phase.name: phase.seconds / self.seconds if self.seconds else 0.0
      for phase in self.phases
    }

  @property
  def tokens_per_second_per_chip(self) -> float:
    """Completion tokens."""
    return self.tokens / self.seconds / self.chips if self.seconds else 0.0


def predict(
  chip: Chip, works: Mapping[str, Work], *, tokens: float, devices: int
) -> Prediction:
  """Seconds from work.

  A ring uses both directions of one dimension of a torus, so two links; all
  links of a GPU lead to its switch and are counted as one.

  Args:
    chip: the device.
    works: of one device, by phase.
    tokens: completion tokens of a step, over all devices.
    devices: as JAX counts them.
  """
  ring = min(chip.links, 2) * chip.link
  return Prediction(
    phases=tuple(
      Phase(
        name=name,
        compute=work.operations / chip.flops,
        memory=work.hbm / chip.bandwidth,
        interconnect=work.links / ring
        + work.network / chip.network
        + work.hops * HOP,
      )
      for name, work in works.items()
    ),
    tokens=tokens,
    chips=devices / chip.per_chip,
  )


def measured(
  programs: Collection[Loop],
  estimate: Mapping[str, Work],
  mesh: Mapping[str, int],
  across: Mapping[str, int],
) -> dict[str, Work]:
  """Work with the bytes and collectives of compiled programs.

  Vocabulary heads of frozen models run in the student's loop and count as
  "update".

  Args:
    programs: all of a step, from `hlo.analyse`.
    estimate: of `estimated`; its operations are taken.
    mesh: sizes of the axes, in their order.
    across: slices or boxes that each axis spans.
  """
  works = {name: Work(operations=w.operations) for name, w in estimate.items()}
  for program in programs:
    for name, part in by_part(program, phase_of).items():
      works[name] += Work(hbm=part.bytes)
      for collective, runs in part.collectives:
        works[name] += _sent(collective, mesh, across).times(runs)
  return works


def phase_of(op_name: str) -> str:
  """The phase of an operation, from the name that JAX gave it."""
  names = op_name.replace("(", "/").replace(")", "/").split("/")
  if "rollout" in names:
    return "sample"
  frozen_roles = ("teacher", "reference")
  return "score" if any(role in names for role in frozen_roles) else "update"


def _sent(
  collective: Collective, mesh: Mapping[str, int], across: Mapping[str, int]
) -> Work:
  outer = len(
    {_slice_of(number, mesh, across) for number in collective.devices}
  )
  if collective.kind in ("collective-permute", "collective-broadcast"):
    sent = float(collective.payload)
    return Work(network=sent) if outer > 1 else Work(links=sent, hops=1)
  passes = 2 if collective.kind == "all-reduce" else 1
  inner = len(collective.devices) // outer
  return _ring(collective.payload, inner, outer).times(passes)


def _slice_of(
  number: int, mesh: Mapping[str, int], across: Mapping[str, int]
) -> tuple[int, ...]:
  """Where the slice of a device lies among the slices, by axis."""
  place, stride = [], math.prod(mesh.values())
  for axis, size in mesh.items():
    stride //= size
    place.append(number // stride % size * across[axis] // size)
  return tuple(place)


def _ring(payload: float, inner: int, outer: int) -> Work:
  """One pass: inside each slice, then of a device's share between slices.

  Args:
    payload: bytes of the whole array.
    inner: devices of a slice that take part.
    outer: slices.
  """
  return Work(
    links=payload * (inner - 1) / inner,
    network=payload / inner * (outer - 1) / outer,
    hops=inner // 2,
  )


def estimated(
  step: Step,
  *,
  prompts: int,
  window: int,
  across: Mapping[str, int],
  teacher_window: int | None = None,
  length: float | None = None,
) -> dict[str, Work]:
  """Work from shapes alone.

  Of HBM the weights, the cache and the optimizer state are counted, not the
  activations; of the interconnect the gathers of weights, the sums of gradients
  and those over the tensor axis.

  Args:
    step: of the run; all axes of its mesh.
    prompts: of a step, over all devices.
    window: P, slots of a prompt.
    teacher_window: slots of the teacher's prompts; None for the student's.
    length: tokens of a completion; None for as many as may be drawn.
    across: slices or boxes that each axis of the mesh spans.
  """
  student, decoder = step.scorer.student, step.decoder
  drawn = float(step.sampling.max_new_tokens if length is None else length)
  rows = prompts * step.rollouts
  devices = student.layout.mesh.size
  parts = step.micro_batches * step.mini_batches
  passes = parts * step.epochs

  held, trained = student.abstract_held(), student.abstract_trained()
  copy = shard_bytes(decoder.abstract_params(decoder.compute_dtype))
  slots = window + step.sampling.max_new_tokens
  filled = shard_bytes(cache(decoder, rows, slots))
  operations = flops.forward(
    student.config, prompts * window, window / 2, prompts
  ) + flops.forward(
    student.config, rows * drawn, window + drawn / 2, rows * drawn
  )
  one = share(rows, decoder.layout)
  embed = student.layout.mesh_axes("embed")
  sample = (
    Work(operations=operations / devices, hbm=copy + drawn * (copy + filled))
    + _over(student, embed, shard_bytes(decode_copy(held, decoder)), across)
    + _over_tensor(decoder, one, across).times(drawn)
  )

  score, tokens = Work(), rows / parts
  for role, model in frozen(step).items():
    own = window
    if role.startswith("teacher") and teacher_window is not None:
      own = teacher_window
    score += _forward(model, tokens, own + drawn, drawn, across).times(passes)

  # A backward pass is one or two forward ones, and "full" runs one more.
  again = 1.0 + flops.BACKWARD[student.lora is not None]
  again += student.remat == "full"
  forward = _forward(student, tokens, window + drawn, drawn, across)
  gradient = shard_bytes(trained) * student.layout.shards("embed")
  state = shard_bytes((step.abstract_state().optimizer, trained))
  update = forward.times(passes * again) + Work(
    hbm=passes * 2 * gradient + 2 * step.mini_batches * step.epochs * state,
  )
  update += _summed(student, across).times(passes)
  return {"sample": sample, "score": score, "update": update}


def _forward(
  model: Model,
  rows: float,
  slots: float,
  drawn: float,
  across: Mapping[str, int],
) -> Work:
  """One forward pass of rows over all devices."""
  layout = model.layout
  weights = shard_bytes(model.abstract_params(model.compute_dtype))
  gathered = weights * layout.shards("embed")
  operations = flops.forward(
    model.config, rows * slots, slots / 2, rows * drawn
  )
  return (
    Work(operations=operations / layout.mesh.size, hbm=gathered)
    + _over(model, layout.mesh_axes("embed"), gathered, across)
    + _over_tensor(model, rows * slots / layout.shards("batch"), across)
  )


def _over_tensor(
  model: Model, tokens: float, across: Mapping[str, int]
) -> Work:
  """The two sums of a layer that tensor shards share, of tokens of a device."""
  payload = tokens * model.config.hidden_size * itemsize(model)
  heads = model.layout.mesh_axes("heads")
  sums = 2 * model.config.num_layers
  return _over(model, heads, payload, across).times(2 * sums)


def _summed(student: Model, across: Mapping[str, int]) -> Work:
  """The sum of gradients over the devices that have other rows or slots.

  A weight that is spread over some of them keeps a share of the sum; one of
  experts has met all rows where it lies.
  """
  layout = student.layout
  spread = layout.mesh_axes("batch") + layout.mesh_axes("sequence")
  work = Work()
  for leaf in jax.tree.leaves(student.abstract_trained()):
    size = shard_bytes(leaf)
    axes = set(jax.tree.leaves(tuple(leaf.sharding.spec)))
    scattered = [
      axis
      for axis in spread
      if axis in axes and axis not in layout.mesh_axes("experts")
    ]
    shards = math.prod(layout.mesh.shape[axis] for axis in scattered)
    work += _over(student, scattered, size * shards, across)
    kept = [axis for axis in spread if axis not in axes]
    work += _over(student, kept, size, across).times(2)
  return work


def _over(
  model: Model, axes: Collection[str], payload: float, across: Mapping[str, int]
) -> Work:
  """One pass over mesh axes."""
  outer = math.prod(across[axis] for axis in axes)
  size = math.prod(model.layout.mesh.shape[axis] for axis in axes)
  return _ring(payload, size // outer, outer)
