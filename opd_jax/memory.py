"""What a step needs of each device's memory, counted before it has any.

Some of it is exact: arrays whose shapes and places are known before they exist.
The rest is what one compiled step holds while it runs, which the compiler
decides; it is estimated from the same shapes. Nothing is compiled.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from opd_jax.models import Model, ModelConfig
from opd_jax.models.cache import CACHE_AXES, KVCache
from opd_jax.sharding import Layout, make_mesh
from opd_jax.step import Step
from opd_jax.types import Params, PromptBatch, ScoringBatch

# An update first runs all models forward, then loops over the vocabulary, then
# runs backward; what is marked "update" is there in all three.
Phase = Literal[
  "always",
  "sampling",
  "evaluation",
  "update",
  "frozen forward",
  "vocabulary loop",
  "backward pass",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """Something that lies in the memory of a device.

  Attributes:
    name: of it.
    size: bytes on the device that holds most of it.
    phase: the part of the step during which it is there.
    exact: counted, not estimated.
    formula: how the size comes about.
  """

  name: str
  size: int
  phase: Phase
  exact: bool
  formula: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
  """The memory of a step.

  Attributes:
    parts: all that is counted.
    limit: bytes that the device offers; None where it does not say.
  """

  parts: tuple[Part, ...]
  limit: int | None

  @property
  def resident(self) -> int:
    """Bytes that are held from the first step to the last; exact."""
    return self._sum("always")

  @property
  def total(self) -> int:
    """Bytes at the fullest moment of a step; an estimate."""
    update = self._sum("update") + max(
      self._sum("frozen forward"),
      self._sum("vocabulary loop"),
      self._sum("backward pass"),
    )
    return self.resident + max(
      self._sum("sampling"), self._sum("evaluation"), update
    )

  def _sum(self, phase: Phase) -> int:
    return sum(part.size for part in self.parts if part.phase == phase)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
  """Sizes of what is sampled at the same time.

  Attributes:
    prompts: over all devices.
    rollouts: G, completions of each.
    window: P, slots of a prompt.
    length: T, slots of a completion.
  """

  prompts: int
  rollouts: int
  window: int
  length: int


def estimate(
  step: Step,
  prompts: int,
  window: int,
  teacher_window: int | None = None,
  evaluation: Decoding | None = None,
  same_weights: bool = False,
) -> Estimate:
  """Counts what one device holds during a step.

  Left out: the programs themselves, ids and masks, the weights of one layer
  while they are gathered, what the compiler keeps beyond the values that the
  backward pass needs, and what the runtime reserves.

  Args:
    step: of the run.
    prompts: per step, over all devices.
    window: P, slots of a prompt.
    teacher_window: slots of the teacher's prompts; None for the student's.
    evaluation: of the student, between steps.
    same_weights: a teacher and the reference hold the same arrays.
  """
  rows = prompts * step.rollouts
  length = step.sampling.max_new_tokens
  # A row's prefix is its own, and the student reads it with the prompt.
  prefixes = step.mixing.prefix != "none"
  rollout = Decoding(
    prompts=rows if prefixes else prompts,
    rollouts=1 if prefixes else step.rollouts,
    window=window + length if prefixes else window,
    length=length,
  )
  parts = [
    *_weights(step, same_weights),
    *_sampling(step, rollout, "sampling", ""),
    *_update(step, rows, window, teacher_window or window),
  ]
  if evaluation is not None:
    parts += _sampling(step, evaluation, "evaluation", "evaluation: ")
  return Estimate(parts=tuple(parts), limit=device_limit())


def device_limit() -> int | None:
  """Bytes that the first device offers; None where it does not say."""
  statistics = jax.local_devices()[0].memory_stats()
  return (statistics or {}).get("bytes_limit")


def shard_bytes(tree: Any) -> int:
  """Bytes of one device's shards of arrays or `ShapeDtypeStruct`s."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape))
    * jnp.dtype(leaf.dtype).itemsize
    for leaf in jax.tree.leaves(tree)
  )


def decode_copy(held: Params, decoder: Model) -> list[jax.ShapeDtypeStruct]:
  """A model's weights while it samples, without those used in place.

  Args:
    held: shapes, dtypes and places of its weights at all times.
    decoder: the model in the decode layout.
  """
  dtype = decoder.compute_dtype

  def copied(path: Any, old: Any, new: Any) -> Any:
    cast = new.dtype if path[-1].key == "scale" else jnp.dtype(dtype)
    same_place = new.sharding.is_equivalent_to(old.sharding, len(new.shape))
    if cast == old.dtype and same_place:
      return None
    return jax.ShapeDtypeStruct(new.shape, cast, sharding=new.sharding)

  copies = decoder.abstract_params()
  return jax.tree.leaves(jax.tree_util.tree_map_with_path(copied, held, copies))


def cache(model: Model, rows: int, slots: int) -> KVCache:
  """The keys and values of `rows` rows of `slots` slots, in their places."""
  spread = rows % model.layout.shards("batch") == 0

  def place(leaf: Any) -> Any:
    axes = CACHE_AXES if len(leaf.shape) == len(CACHE_AXES) else ("batch", None)
    if not spread:
      axes = tuple(None if name == "batch" else name for name in axes)
    sharding = model.layout.sharding(axes, leaf.shape)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  shapes = jax.eval_shape(lambda: model.init_cache(rows, slots))
  return jax.tree.map(place, shapes)


def _weights(step: Step, same_weights: bool) -> Iterable[Part]:
  state = step.abstract_state()
  yield Part(
    name="student weights",
    size=shard_bytes(state.params),
    phase="always",
    exact=True,
    formula="parameters x 4 bytes, float32",
  )
  yield Part(
    name="optimizer state",
    size=shard_bytes((state.optimizer, state.objective, state.step)),
    phase="always",
    exact=True,
    formula="parameters x 2 moments x 4 bytes",
  )
  if step.replay is not None:
    yield Part(
      name="replay buffer",
      size=shard_bytes(state.replay),
      phase="always",
      exact=True,
      formula="rollout.replay_capacity x (prompt and completion) x 4 bytes",
    )
  for role, model in _frozen(step).items():
    if role == "reference" and same_weights:
      continue
    yield Part(
      name=f"{role} weights",
      size=shard_bytes(model.abstract_params(model.compute_dtype)),
      phase="always",
      exact=True,
      formula=f"parameters x {_itemsize(model)} bytes",
    )


def _frozen(step: Step) -> dict[str, Model]:
  """The frozen models by role."""
  scorer = step.scorer
  models = {
    "teacher": scorer.teacher,
    **{
      f"teacher {number}": model
      for number, model in enumerate(scorer.other_teachers, start=2)
    },
    "reference": scorer.reference,
  }
  return {role: model for role, model in models.items() if model is not None}


def _sampling(
  step: Step, sizes: Decoding, phase: Phase, prefix: str
) -> Iterable[Part]:
  yield from _decoder(
    step.decoder,
    step.scorer.student.abstract_params(),
    sizes,
    phase,
    prefix,
  )
  teacher = step.scorer.teacher
  if phase == "sampling" and step.teacher_decoder and teacher:
    yield from _decoder(
      step.teacher_decoder,
      teacher.abstract_params(teacher.compute_dtype),
      sizes,
      phase,
      "teacher: ",
    )


def _decoder(
  model: Model, held: Params, sizes: Decoding, phase: Phase, prefix: str
) -> Iterable[Part]:
  """What a model that draws needs while it does."""
  slots = sizes.window + sizes.length
  rows = sizes.prompts * sizes.rollouts
  yield Part(
    name=f"{prefix}decode copy",
    size=shard_bytes(decode_copy(held, model)),
    phase=phase,
    exact=True,
    formula=(
      f"parameters x {_itemsize(model)} bytes, where dtype or place changes"
    ),
  )
  yield Part(
    name=f"{prefix}KV cache",
    size=shard_bytes(cache(model, rows, slots)),
    phase=phase,
    exact=True,
    formula=(
      f"{rows} rows x {slots} slots x layers x kv heads x head size x 2 x "
      f"{_itemsize(model)} bytes"
    ),
  )
  if sizes.rollouts > 1:
    yield Part(
      name=f"{prefix}KV cache of the prompts",
      size=shard_bytes(cache(model, sizes.prompts, slots)),
      phase=phase,
      exact=False,
      formula="the same of the prompts, before the copy to rollouts",
    )
  columns = _columns(model)
  yield Part(
    name=f"{prefix}logits of the draw",
    size=_share(rows, model.layout) * columns * 4 * 2,
    phase=phase,
    exact=False,
    formula="rows x vocabulary x 4 bytes, twice",
  )


def _update(
  step: Step, rows: int, window: int, teacher_window: int
) -> Iterable[Part]:
  student = step.scorer.student
  frozen = _frozen(step)
  models = [student, *frozen.values()]
  length = step.sampling.max_new_tokens
  slots = window + length
  parts = step.mini_batches * step.micro_batches
  rows = _share(rows // parts, student.layout)
  gradients = shard_bytes(student.abstract_params())
  if step.micro_batches > 1:
    yield Part(
      name="sum of the gradients",
      size=gradients,
      phase="update",
      exact=False,
      formula="parameters x 4 bytes, over the micro-batches",
    )
  yield Part(
    name="gradients",
    size=gradients,
    phase="backward pass",
    exact=False,
    formula="parameters x 4 bytes",
  )
  kept, layer = _activations(step, rows, window)
  yield Part(
    name="activations",
    size=kept,
    phase="update",
    exact=False,
    formula=(
      f"kept for the backward pass, {rows} rows x {slots} slots, traced with "
      f"student.remat = {student.remat!r}"
    ),
  )
  widths = sum(model.config.hidden_size * _itemsize(model) for model in models)
  yield Part(
    name="hidden states",
    size=2 * rows * length * widths,
    phase="update",
    exact=False,
    formula="tokens x width of each model, twice",
  )
  attention = []
  for role, model in frozen.items():
    heads = model.config.num_heads // model.layout.shards("heads")
    seen = length + (window if role == "reference" else teacher_window)
    attention.append((2 * rows * heads * seen * seen * 4, role))
  if attention:
    size, role = max(attention)  # One model runs after the other.
    yield Part(
      name=f"attention of the {role}",
      size=size,
      phase="frozen forward",
      exact=False,
      formula="rows x heads x slots x slots x 4 bytes, twice",
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
  tokens = rows * min(max(step.scorer.chunk_tokens // max(1, rows), 1), chosen)
  columns = sum(map(_columns, models))
  yield Part(
    name="distributions of a chunk",
    size=tokens * 4 * (2 * columns + 3 * _columns(student)),
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
    ),
  )


def _heads(models: list[Model]) -> int:
  """Bytes of the heads in the loop: the student's, its gradients, the others'.

  The gradient is there as a sum, as that of a chunk, and where the batch is
  spread as the sum over the devices.
  """
  student = models[0]
  copies = 2 + (student.layout.shards("batch") > 1)
  size = copies * _columns(student) * student.config.hidden_size * 4
  for model in models:
    weights = _columns(model) * model.config.hidden_size
    master = 4 if model is student else _itemsize(model)
    if model.layout.shards("embed") > 1:
      size += weights * master
    if _itemsize(model) != master:
      size += weights * _itemsize(model)
  return size


def _activations(step: Step, rows: int, window: int) -> tuple[int, int]:
  """Bytes kept for the backward pass, and those of a layer while it runs."""
  student = step.scorer.student
  one = Layout.create(
    make_mesh({}, jax.local_devices()[:1]), dict(student.layout.rules)
  )
  config = _local(student.config, student.layout.shards("heads"))
  local = dataclasses.replace(student, config=config, layout=one)

  def kept(model: Model, layers: int) -> list[int]:
    config = dataclasses.replace(model.config, num_layers=layers)
    model = dataclasses.replace(model, config=config)
    return _residuals(step, model, rows, window)

  total = sum(kept(local, config.num_layers))
  if student.remat == "none":
    return total, 2 * max(kept(local, 1))
  # What two layers keep beyond one, where nothing is recomputed.
  whole = dataclasses.replace(local, remat="none")
  return total, sum(kept(whole, 2)) - sum(kept(whole, 1))


def _residuals(step: Step, model: Model, rows: int, window: int) -> list[int]:
  """Bytes of each value kept for the backward pass, by tracing it."""
  scorer = dataclasses.replace(step.scorer, student=model)
  batch = _abstract_batch(rows, window, step.sampling.max_new_tokens)
  roles = step.objective.needs.gradient_roles()
  trunk, _ = model.split_head(
    jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
      model.abstract_params(),
    )
  )

  def backward(trunk: Params, batch: ScoringBatch) -> Any:
    _, pull = jax.vjp(
      lambda trunk: [scorer.hidden(role, trunk, batch) for role in roles],
      trunk,
    )
    return pull

  kept = jax.tree.leaves(jax.eval_shape(backward, trunk, batch))
  weights = {leaf.shape for leaf in jax.tree.leaves(trunk)}
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


def _local(config: ModelConfig, shards: int) -> ModelConfig:
  """The model as one of `shards` tensor shards sees it."""
  heads = config.num_heads // shards
  kv_heads = math.gcd(heads, config.num_kv_heads)
  if config.num_kv_heads % shards == 0:
    kv_heads = config.num_kv_heads // shards
  experts = config.experts
  if experts is not None:
    experts = dataclasses.replace(experts, size=experts.size // shards)
  return dataclasses.replace(
    config,
    experts=experts,
    num_heads=heads,
    num_kv_heads=kv_heads,
    intermediate_size=config.intermediate_size // shards,
  )


def _share(rows: int, layout: Layout) -> int:
  """Rows on one device; too few to spread are on all of them."""
  shards = layout.shards("batch")
  return rows if rows % shards else rows // shards


def _columns(model: Model) -> int:
  """Columns of the vocabulary on one device."""
  return model.config.padded_vocab_size // model.layout.shards("vocab")


def _itemsize(model: Model) -> int:
  return jnp.dtype(model.compute_dtype).itemsize
