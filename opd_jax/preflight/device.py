"""Memory of each device, before anything is placed on it."""

from opd_jax import memory
from opd_jax.memory import Decoding, Estimate, size_text
from opd_jax.preflight.report import Finding, Section, table
from opd_jax.setup import Setup
from opd_jax.step import Step


def inspect(setup: Setup, step: Step) -> Section:
  """Estimates the memory of a step and compares it with a device's."""
  found = memory.estimate(
    step,
    setup.config.batch.prompts,
    setup.config.data.max_prompt_tokens,
    setup.prompts.teacher_window,
    _evaluation(setup, step),
    shared=setup.shared,
  )
  rows = [
    (
      part.name,
      f"{'' if part.exact else '~'}{size_text(part.size)}",
      part.phase,
      part.formula,
    )
    for part in found.parts
    if part.size
  ]
  devices = step.scorer.student.layout.mesh.size
  limit = "unknown" if found.limit is None else size_text(found.limit)
  lines = (
    f"of each of {devices} devices; ~ marks an estimate:",
    *table(rows),
    f"held all the time: {size_text(found.resident)}",
    f"at the fullest moment of a step: ~{size_text(found.total)}; a device "
    f"offers {limit}",
    "left out: programs, ids and masks, one layer's gathered weights, what "
    "the compiler and the runtime add",
  )
  return Section(
    title="memory",
    lines=lines,
    figures={
      "devices": devices,
      "resident_bytes": found.resident,
      "total_bytes": found.total,
      "limit_bytes": found.limit,
      "parts": {
        part.name: {
          "bytes": part.size,
          "exact": part.exact,
          "phase": part.phase,
        }
        for part in found.parts
      },
    },
    findings=findings(found),
  )


def findings(found: Estimate) -> tuple[Finding, ...]:
  """Whether a step fits."""
  limit = found.limit
  if limit is None or found.total <= limit:
    return ()
  if found.resident > limit:
    return (
      Finding(
        name="memory_exceeded",
        message=(
          f"weights and optimizer state take {size_text(found.resident)} of "
          f"each device, which offers {size_text(limit)}; use more devices "
          "(mesh.fsdp, mesh.tensor), smaller models, teacher.compute_dtype "
          '"bfloat16", or teacher.weight_dtype "int8"'
        ),
      ),
    )
  largest = max(found.parts, key=lambda part: part.size)
  return (
    Finding(
      name="memory_tight",
      message=(
        f"a step takes about {size_text(found.total)} of each device, which "
        f"offers {size_text(limit)}; the largest part is {largest.name} "
        f"({size_text(largest.size)}); raise batch.micro_batches, set "
        'student.remat to "full", or lower batch.prompts, batch.chunk_tokens, '
        "sampling.max_new_tokens or eval.batch"
      ),
    ),
  )


def _evaluation(setup: Setup, step: Step) -> Decoding | None:
  """What the evaluation of the student samples at the same time."""
  if setup.problems is None:
    return None
  asked = setup.problems.prompts
  shards = step.decoder.layout.shards("batch")
  prompts = min(asked.batch, len(asked.prompts))
  return Decoding(
    prompts=-(-prompts // shards) * shards,
    rollouts=asked.samples,
    window=max(len(prompt.ids) for prompt in asked.prompts),
    length=asked.sampling.max_new_tokens,
  )
