"""The memory of an update: activations, distributions, gradients."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from opd_jax.memory.parts import (
  Part,
  attended,
  columns,
  frozen,
  itemsize,
  local,
  shard_bytes,
  share,
  slots_of,
)
from opd_jax.models import Model
from opd_jax.models.places import Blocks
from opd_jax.scoring import Parameters
from opd_jax.sharding import Layout, make_mesh
from opd_jax.step import Step
from opd_jax.types import Params, PromptBatch, ScoringBatch


def update(
  step: Step, rows: int, window: int, teacher_window: int
) -> Iterable[Part]:
  """What is held while the models score `rows` rows and the student learns."""
  student = step.scorer.student
  scored = frozen(step)
  models = [student, *scored.values()]
  length = step.sampling.max_new_tokens
  slots = window + length
  parts = step.mini_batches * step.micro_batches
  rows = share(rows // parts, student.layout)
  gradients = shard_bytes(student.abstract_trained())
  if step.micro_batches > 1:
    yield Part(
      name="sum of the gradients",
      size=gradients,
      phase="update",
      exact=False,
      formula="trained parameters x 4 bytes, over the micro-batches",
    )
  yield Part(
    name="gradients",
    size=gradients,
    phase="backward pass",
    exact=False,
    formula="trained parameters x 4 bytes",
  )
  kept, layer = _activations(step, rows, window)
  if Blocks.of(slots, student.layout) is not None:
    layer += attended(student, rows, slots)
  yield Part(
    name="activations",
    size=kept,
    phase="update",
    exact=False,
    formula=(
      f"kept for the backward pass, {rows} rows x "
      f"{slots_of(slots, student.layout)} slots, traced with "
      f"student.remat = {student.remat!r}"
    ),
  )
  widths = sum(model.config.hidden_size * itemsize(model) for model in models)
  yield Part(
    name="hidden states",
    size=2 * rows * slots_of(length, student.layout) * widths,
    phase="update",
    exact=False,
    formula="tokens x width of each model, twice",
  )
  attention = []
  for role, model in scored.items():
    seen = length + (window if role == "reference" else teacher_window)
    attention.append((attended(model, rows, seen), role))
  if attention:
    size, role = max(attention)  # One model runs after the other.
    yield Part(
      name=f"attention of the {role}",
      size=size,
      phase="frozen forward",
      exact=False,
      formula="rows x heads x scores x 4 bytes, twice",
    )
  chosen = length
  if step.selector is not None:
    chosen = step.selector.capacity(length)
    yield Part(
      name="hidden states of the chosen tokens",
      size=2 * rows * chosen * widths,
      phase="vocabulary loop",
      exact=False,
      formula="tokens that may be chosen x width of each model, twice",
    )
  # The pass that ranks all tokens has chunks of no more slots.
  chosen = slots_of(chosen, student.layout)
  tokens = rows * min(max(step.scorer.chunk_tokens // max(1, rows), 1), chosen)
  width = sum(map(columns, models))
  yield Part(
    name="distributions of a chunk",
    size=tokens * 4 * (2 * width + 3 * columns(student)),
    phase="vocabulary loop",
    exact=False,
    formula=(
      f"{tokens} tokens x vocabulary x 4 bytes, 2 of each model, 3 to "
      "differentiate"
    ),
  )
  yield Part(
    name="vocabulary heads",
    size=_heads(models),
    phase="vocabulary loop",
    exact=False,
    formula=(
      "vocabulary x width: gradients, and what is gathered or cast of each"
    ),
  )
  yield Part(
    name="one layer backward",
    size=layer,
    phase="backward pass",
    exact=False,
    formula=(
      "the two largest activations of a layer"
      if student.remat == "none"
      else "the activations of one layer, recomputed"
    )
    + ", and blocks of attention",
  )


def _heads(models: list[Model]) -> int:
  """Bytes of the heads in the loop: the student's, its gradients, the others'.

  The gradient is there as a sum, as that of a chunk, and where tokens are
  spread as the sum over the devices; where adapters are trained, not at all.
  """
  student = models[0]
  spread = student.layout.shards("batch") * student.layout.shards("sequence")
  copies = 2 + (spread > 1)
  if student.lora is not None:
    copies = 0
  size = copies * columns(student) * student.config.hidden_size * 4
  for model in models:
    weights = columns(model) * model.config.hidden_size
    trained = model is student and student.lora is None
    master = 4 if trained else itemsize(model)
    if model.layout.shards("embed") > 1:
      size += weights * master
    if itemsize(model) != master:
      size += weights * itemsize(model)
  return size


def _activations(step: Step, rows: int, window: int) -> tuple[int, int]:
  """Bytes kept for the backward pass, and those of a layer while it runs."""
  student = step.scorer.student
  shards = student.layout.shards("sequence")
  one = Layout.create(
    make_mesh({}, jax.local_devices()[:1]), dict(student.layout.rules)
  )
  config = local(student.config, student.layout.shards("heads"))
  alone = dataclasses.replace(student, config=config, layout=one)

  def kept(model: Model, layers: int) -> list[int]:
    config = dataclasses.replace(model.config, num_layers=layers)
    model = dataclasses.replace(model, config=config)
    found = _residuals(step, model, rows, window)
    return [size // shards for size in found]

  total = sum(kept(alone, config.num_layers))
  if student.remat == "none":
    return total, 2 * max(kept(alone, 1))
  # What two layers keep beyond one, where nothing is recomputed.
  whole = dataclasses.replace(alone, remat="none")
  return total, sum(kept(whole, 2)) - sum(kept(whole, 1))


def _residuals(step: Step, model: Model, rows: int, window: int) -> list[int]:
  """Bytes of each value kept for the backward pass, by tracing it."""
  scorer = dataclasses.replace(step.scorer, student=model)
  batch = _abstract_batch(rows, window, step.sampling.max_new_tokens)
  roles = step.objective.needs.gradient_roles()

  def unplaced(params: Params) -> Any:
    return jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params
    )

  trained, base = unplaced(model.abstract_trained()), None
  if model.lora is None:
    trained, _ = model.split_head(trained)
  else:
    base = unplaced(model.abstract_held())

  def backward(trained: Params, base: Params | None, batch: Any) -> Any:
    def run(trained: Params) -> Any:
      params = Parameters(student=trained, base=base).of("student")
      return [scorer.hidden(role, params, batch) for role in roles]

    _, pull = jax.vjp(run, trained)
    return pull

  kept = jax.tree.leaves(jax.eval_shape(backward, trained, base, batch))
  weights = {leaf.shape for leaf in jax.tree.leaves((trained, base))}
  return [
    math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize
    for leaf in kept
    if leaf.shape not in weights
  ]


def _abstract_batch(rows: int, window: int, length: int) -> ScoringBatch:
  def struct(dtype: Any, *shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)

  prompts = PromptBatch(
    tokens=struct(jnp.int32, rows, window), lengths=struct(jnp.int32, rows)
  )
  return ScoringBatch(
    prompts=prompts,
    privileged=prompts,
    tokens=struct(jnp.int32, rows, length),
    lengths=struct(jnp.int32, rows),
    sampled_mask=struct(bool, rows, length),
    loss_mask=struct(bool, rows, length),
    behavior_valid=struct(bool, rows, length),
    behavior_logprobs=struct(jnp.float32, rows, length),
    group=struct(jnp.int32, rows),
  )
