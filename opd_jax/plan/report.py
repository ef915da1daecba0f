"""What `opd-jax plan` tells: lines for people, figures for programs."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from opd_jax.memory import Part, size_text
from opd_jax.plan import hlo
from opd_jax.plan.compiling import Account, Compiled, Overflow
from opd_jax.plan.fit import Counted
from opd_jax.plan.remedies import Remedy
from opd_jax.plan.speed import Decoding, Speed

# Collectives and operations that are shown, operations that move too much, and
# the part of all bytes from which on they do.
_SHOWN, _WORST, _EXCESS = 8, 3, 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
  """A plan.

  Attributes:
    location: of the config.
    counted: from shapes.
    compiled: by the compiler; None where it was not asked.
    speed: how fast it would be.
    remedies: changes that were tried; None where none were looked for.
  """

  location: str
  counted: Counted
  compiled: Compiled | None
  speed: Speed
  remedies: Sequence[Remedy] | None = None

  @property
  def fits(self) -> bool:
    """Whether it does; without a compiler, by the estimate."""
    if self.compiled is None:
      return self.counted.estimate.total <= self.counted.memory
    return self.compiled.fits(self.counted.memory)

  def lines(self) -> Iterator[str]:
    """For people, at most 80 columns but for names."""
    yield from _run(self)
    yield ""
    yield from _memory(self)
    if self.compiled is not None and self.compiled.overflow is not None:
      yield ""
      yield from _overflow(self, self.compiled.overflow)
    else:
      yield ""
      yield from _speed(self.speed)
    if self.remedies is not None:
      yield ""
      yield from _remedies(self.counted.memory, self.remedies)

  def figures(self) -> dict[str, Any]:
    """The same, as JSON; sizes are bytes of one device."""
    counted, compiled = self.counted, self.compiled
    where = counted.topology
    estimate = counted.estimate
    figures: dict[str, Any] = {
      "config": self.location,
      "topology": where.name,
      "chips": where.chips,
      "devices": where.devices,
      "mesh": dict(counted.step.scorer.student.layout.mesh.shape),
      "mode": counted.blueprint.mode,
      "memory_bytes": counted.memory,
      "fits": self.fits,
      "estimate": {
        "resident_bytes": estimate.resident,
        "total_bytes": estimate.total,
        "parts": {
          part.name: {
            "bytes": part.size,
            "exact": part.exact,
            "phase": part.phase,
          }
          for part in estimate.parts
        },
      },
    }
    if compiled is None or compiled.overflow is None:
      figures["speed"] = _figures_of_speed(self.speed)
    if compiled is not None:
      figures["compile_seconds"] = compiled.seconds
      figures["programs"] = {
        account.name: _figures_of(account) for account in compiled.accounts
      }
      if compiled.overflow is None:
        figures["total_bytes"] = compiled.total
        figures["used"] = compiled.total / counted.memory
      else:
        figures["overflow"] = dataclasses.asdict(compiled.overflow)
    if self.remedies is not None:
      figures["remedies"] = [
        {
          "overrides": list(remedy.change.overrides),
          "alters": remedy.change.alters,
          "fits": remedy.fits,
          "total_bytes": remedy.total if remedy.fits else None,
          "compile_seconds": remedy.compiled and remedy.compiled.seconds,
        }
        for remedy in self.remedies
      ]
    return figures


def _figures_of(account: Account) -> dict[str, Any]:
  return {
    "argument_bytes": account.arguments,
    "temporary_bytes": account.temporaries,
    "result_bytes": account.results,
    "code_bytes": account.code,
    "total_bytes": account.total,
    "largest": [
      {"bytes": size, "what": what} for size, what in account.largest
    ],
  }


def _figures_of_speed(speed: Speed) -> dict[str, Any]:
  found = speed.prediction
  figures: dict[str, Any] = {
    "compiled": speed.compiled,
    "seconds": found.seconds,
    "tokens_per_second_per_chip": found.tokens_per_second_per_chip,
    "phases": {
      phase.name: {
        "seconds": phase.seconds,
        "share": found.shares[phase.name],
        "compute": phase.compute,
        "memory": phase.memory,
        "interconnect": phase.interconnect,
        "bound": phase.bound,
      }
      for phase in found.phases
    },
    "collectives": [dataclasses.asdict(one) for one in speed.traffic],
  }
  if speed.decoding is not None:
    decoding = speed.decoding
    figures["decode"] = {
      "moved_bytes": decoding.moved,
      "weight_bytes": decoding.weights,
      "cache_bytes": decoding.cache,
      "ratio": decoding.ratio,
      "weight_gathers": list(decoding.gathers),
      "moves": [
        {
          "bytes": move.bytes,
          "excess": move.excess,
          "runs": move.runs,
          "what": move.operation.source or move.operation.name,
        }
        for move in decoding.moves[:_SHOWN]
      ],
    }
  return figures


def _run(report: Report) -> Iterator[str]:
  """What is planned."""
  counted = report.counted
  config, where = counted.blueprint.config, counted.topology
  machines = f"{where.chips} chips" if where.is_tpu else f"{where.chips} GPUs"
  if where.devices != where.chips:
    machines += f", {where.devices} devices"
  yield f"{report.location} on {where.name}: {machines}"
  models = [f"student {config.student.path}", f"teacher {config.teacher.path}"]
  models += [
    f"{other.role} {other.source.path}"
    for other in counted.blueprint.domain_teachers
  ]
  if config.reference is not None:
    models.append(f"reference {config.reference.path}")
  yield ", ".join(models)
  mesh = counted.step.scorer.student.layout.mesh.shape
  sizes = " x ".join(f"{axis} {n}" for axis, n in mesh.items() if n > 1)
  batch = config.batch
  yield f"mesh {sizes or 'of one device'}, {counted.blueprint.mode} step"
  yield (
    f"{batch.prompts} prompts x {batch.rollouts} rollouts of "
    f"{config.data.max_prompt_tokens:,} + {config.sampling.max_new_tokens:,} "
    f"tokens, {batch.micro_batches} micro-batches"
  )


def _memory(report: Report) -> Iterator[str]:
  counted, compiled = report.counted, report.compiled
  parts = [part for part in counted.estimate.parts if part.size]
  always = [part for part in parts if part.phase == "always"]
  yield f"memory of a device, {size_text(counted.memory)}:"
  yield from _table(
    [
      *_exactly(always),
      ("held all the time", counted.estimate.resident, ""),
    ]
  )
  if compiled is None:
    yield from _estimated(report, parts)
    return
  for account in compiled.accounts:
    yield from _accounted(counted, parts, account)
  if compiled.overflow is None:
    total, memory = compiled.total, counted.memory
    yield (
      f"{'fits' if total <= memory else 'does NOT fit'}: {size_text(total)} of "
      f"{size_text(memory)}, {100 * total / memory:.0f} %; head-room "
      f"{_signed(memory - total)}; compiled in {compiled.seconds:.0f} s"
    )


def _accounted(
  counted: Counted, parts: Sequence[Part], account: Account
) -> Iterator[str]:
  """The compiler's account of a program beside what is known of it."""
  phases = {"train": ("sampling", "update"), "rollout": ("sampling",)}
  phases["update"] = ("update",)
  rows: list[tuple[str, int, str]] = []
  others = account.arguments - counted.estimate.resident
  rows.append(
    ("arguments", account.arguments, f"{_signed(others)} ids, masks, padding")
  )
  rows.append(("temporaries", account.temporaries, "at the fullest moment"))
  if "sampling" in phases[account.name]:
    rows += [
      (f"  {part.name}", part.size, "in it while sampling")
      for part in parts
      if part.exact and part.phase in ("sampling", "decoding")
    ]
  guess = counted.estimate.total - counted.estimate.resident
  rows.append(("  by the count", guess, "~, without a compiler"))
  rows += [("  largest", size, what) for size, what in account.largest[:_WORST]]
  if account.results:
    rows.append(("results", account.results, "metrics, completions"))
  rows.append(("code", account.code, ""))
  rows.append((f"total of {account.name}", account.total, ""))
  yield f"by the compiler, program {account.name}:"
  yield from _table(rows)


def _estimated(report: Report, parts: Sequence[Part]) -> Iterator[str]:
  """Without a compiler."""
  counted = report.counted
  yield "counted from shapes, ~ marks an estimate:"
  yield from _table(
    [
      (
        ("" if part.exact else "~") + part.name,
        part.size,
        part.phase,
      )
      for part in parts
      if part.phase != "always"
    ]
  )
  total, memory = counted.estimate.total, counted.memory
  yield (
    f"{'fits' if report.fits else 'does NOT fit'} by this count: "
    f"~{size_text(total)} of {size_text(memory)}, "
    f"{100 * total / memory:.0f} %"
  )
  if not counted.topology.is_tpu:
    yield "GPUs are never compiled for here: all of this is counted"


def _overflow(report: Report, overflow: Overflow) -> Iterator[str]:
  needed = "more than there is"
  if overflow.used is not None:
    needed = size_text(overflow.used)
  memory = overflow.available or report.counted.memory
  yield (
    f"does NOT fit: program {overflow.name} needs {needed} of "
    f"{size_text(memory)}, says the compiler"
  )
  if overflow.largest:
    yield "the largest arrays in it:"
    yield from _table([("", size, name) for size, name in overflow.largest[:5]])
    return
  parts = sorted(
    (part for part in report.counted.estimate.parts),
    key=lambda part: -part.size,
  )
  yield "the largest parts by the count:"
  yield from _table([(part.name, part.size, part.phase) for part in parts[:5]])


def _speed(speed: Speed) -> Iterator[str]:
  """The time model, the decode loop and the collectives."""
  found = speed.prediction
  origin = "compiled programs" if speed.compiled else "shapes"
  yield f"a step takes at least {found.seconds:.1f} s, by bytes of {origin}:"
  for phase in found.phases:
    yield (
      f"  {phase.name:<8}{phase.seconds:>8.1f} s "
      f"{100 * found.shares[phase.name]:>4.0f} %  compute {phase.compute:.1f}, "
      f"memory {phase.memory:.1f}, interconnect {phase.interconnect:.1f} s"
    )
  yield (
    f"  at most {found.tokens_per_second_per_chip:,.0f} tokens per second and "
    "chip, all rows drawn to their end"
  )
  if speed.decoding is not None:
    yield from _decoding(speed.decoding)
  if speed.traffic:
    yield "collectives of a step, bytes of a device:"
    for one in speed.traffic[:_SHOWN]:
      yield (
        f"  {one.phase:<7} {one.kind:<18} {size_text(one.bytes):>10} in "
        f"{one.runs:,} runs over {' x '.join(one.axes) or 'one device'}"
      )


def _decoding(decoding: Decoding) -> Iterator[str]:
  yield (
    f"decoding a token moves {size_text(decoding.moved)} a device, "
    f"{decoding.ratio:.2f} x (weights {size_text(decoding.weights)} + cache "
    f"{size_text(decoding.cache)})"
  )
  for move in decoding.moves[:_WORST]:
    if move.excess > _EXCESS * decoding.moved:
      yield (
        f"  {size_text(move.excess)} more than it must: "
        f"{hlo.scope_of(move.operation.source) or move.operation.name}"
      )
  if decoding.gathers:
    yield "WEIGHTS ARE GATHERED IN THE DECODE LOOP:"
    yield from (f"  {name}" for name in decoding.gathers)
  else:
    yield "no weights are gathered in the decode loop"


def _remedies(memory: int, tried: Sequence[Remedy]) -> Iterator[str]:
  """Changes; the best first."""
  fitting = [remedy for remedy in tried if remedy.fits]
  if fitting:
    counted = all(remedy.compiled is None for remedy in fitting)
    how = "by this count" if counted else "each compiled"
    yield f"changes with which it fits, {how}:"
  else:
    yield "no change was found with which it fits;"
    yield "  take more or larger devices, or smaller models"
  for remedy in fitting:
    total, about = remedy.total, "~" if remedy.compiled is None else ""
    yield (
      f"  {about}{size_text(total)}, {100 * total / memory:.0f} %: "
      f"{remedy.change.flags}"
      + (f"  ({remedy.change.alters})" if remedy.change.alters else "")
    )
  for remedy in tried:
    if not remedy.fits:
      yield f"  still too large: {remedy.change.flags}"


def _exactly(parts: Sequence[Part]) -> list[tuple[str, int, str]]:
  return [(part.name, part.size, part.formula) for part in parts]


def _table(rows: Sequence[tuple[str, int, str]]) -> Iterator[str]:
  """Names, sizes and notes in columns."""
  width = max((len(name) for name, _, _ in rows), default=0)
  for name, size, note in rows:
    line = f"  {name.ljust(width)}  {size_text(size).rjust(10)}  {note}"
    yield line.rstrip()


def _signed(size: int) -> str:
  return f"-{size_text(-size)}" if size < 0 else f"+{size_text(size)}"
