"""What a step moves and how long it would take, from its compiled programs."""

import dataclasses
from collections.abc import Mapping, Sequence

from opd_jax.memory.drawing import cache
from opd_jax.memory.parts import shard_bytes
from opd_jax.models import Model
from opd_jax.plan import hlo, timing
from opd_jax.plan.fit import Counted
from opd_jax.plan.timing import Prediction
from opd_jax.plan.traffic import Loop, Move
from opd_jax.sharding import across_slices

# The scope of the loop that draws tokens; see `sampling`.
DECODE_LOOP = "decode_loop"

# Collectives that bring what other devices hold, at once or around a ring.
_BRINGS = ("all-gather", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
  """What one turn of the decode loop moves, on one device.

  Attributes:
    moved: bytes read from and written to HBM.
    weights: bytes of the weights in the decode layout.
    cache: bytes of the allocated cache.
    moves: operations, those first that move most beyond what they must.
    gathers: names of collectives that bring weights; there should be none.
  """

  moved: int
  weights: int
  cache: int
  moves: tuple[Move, ...]
  gathers: tuple[str, ...]

  @property
  def ratio(self) -> float:
    """Bytes moved over weights and cache read once."""
    return self.moved / (self.weights + self.cache)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
  """Collectives of one kind in one place of a step.

  Attributes:
    phase: "sample", "score" or "update".
    kind: such as "all-gather".
    axes: of the mesh, that it runs along.
    runs: in a step.
    bytes: of all runs, on one device.
  """

  phase: str
  kind: str
  axes: tuple[str, ...]
  runs: int
  bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
  """How fast a step would be.

  Attributes:
    prediction: of the time.
    compiled: whether its bytes are those of the compiled programs.
    decoding: the decode loop; None without compiled programs.
    traffic: collectives, the largest first.
  """

  prediction: Prediction
  compiled: bool
  decoding: Decoding | None
  traffic: tuple[Traffic, ...]


def of(counted: Counted, texts: Sequence[str]) -> Speed:
  """The speed of a step.

  Args:
    counted: the run.
    texts: optimised HLO of its programs; () to take the bytes from shapes.
  """
  step, config = counted.step, counted.blueprint.config
  length = config.sampling.max_new_tokens
  mesh = dict(step.scorer.student.layout.mesh.shape)
  across = across_slices(mesh, counted.topology.islands)
  works = timing.estimated(
    step,
    prompts=config.batch.prompts,
    window=config.data.max_prompt_tokens,
    teacher_window=counted.blueprint.teacher_window,
    across=across,
  )
  programs = [hlo.analyse(text) for text in texts]
  if programs:
    works = timing.measured(programs, works, mesh, across)
  return Speed(
    prediction=timing.predict(
      counted.topology.device,
      works,
      tokens=config.batch.prompts * config.batch.rollouts * length,
      devices=counted.topology.devices,
    ),
    compiled=bool(programs),
    decoding=_decoding(counted, programs),
    traffic=_traffic(programs, mesh),
  )


def _decoding(counted: Counted, programs: Sequence[Loop]) -> Decoding | None:
  loops = [program.find(DECODE_LOOP) for program in programs]
  loop = next((loop for loop in loops if loop is not None), None)
  if loop is None:
    return None
  step, config = counted.step, counted.blueprint.config
  rows = config.batch.prompts * config.batch.rollouts
  slots = config.data.max_prompt_tokens + config.sampling.max_new_tokens
  decoders = [step.decoder]
  if step.teacher_decoder is not None:
    decoders.append(step.teacher_decoder)
  return Decoding(
    moved=loop.bytes_per_turn(),
    weights=sum(map(_weights, decoders)),
    cache=sum(shard_bytes(cache(decoder, rows, slots)) for decoder in decoders),
    moves=tuple(loop.moves()),
    gathers=tuple(
      collective.source or collective.name
      for collective, _ in loop.turn_collectives()
      if collective.weights and collective.kind in _BRINGS
    ),
  )


def _weights(decoder: Model) -> int:
  return shard_bytes(decoder.abstract_params(decoder.compute_dtype))


def _traffic(
  programs: Sequence[Loop], mesh: Mapping[str, int]
) -> tuple[Traffic, ...]:
  """Collectives by phase, kind and axes."""
  runs: dict[tuple[str, str, tuple[str, ...]], int] = {}
  sizes: dict[tuple[str, str, tuple[str, ...]], int] = {}
  for program in programs:
    for collective, count in program.turn_collectives():
      key = (
        timing.phase_of(collective.source),
        collective.kind,
        collective.axes(mesh),
      )
      runs[key] = runs.get(key, 0) + count
      sizes[key] = sizes.get(key, 0) + count * collective.payload
  found = [
    Traffic(
      phase=phase,
      kind=kind,
      axes=axes,
      runs=runs[phase, kind, axes],
      bytes=size,
    )
    for (phase, kind, axes), size in sizes.items()
  ]
  return tuple(sorted(found, key=lambda one: -one.bytes))
