"""The memory of models that draw: in the rollout, and in an evaluation."""

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from opd_jax.memory.parts import (
  Part,
  Phase,
  attended,
  columns,
  itemsize,
  local,
  shard_bytes,
  share,
  slots_of,
)
from opd_jax.models import Model
from opd_jax.models.cache import CACHE_AXES, KVCache
from opd_jax.step import Step
from opd_jax.types import Params

_PHASES: dict[str, tuple[Phase, Phase]] = {
  "sampling": ("prefill", "decoding"),
  "evaluation": ("evaluation prefill", "evaluation decoding"),
}


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


def decode_copy(held: Params, decoder: Model) -> list[jax.ShapeDtypeStruct]:
  """A model's weights while it samples, without those used in place.

  Args:
    held: shapes, dtypes and places of its weights at all times.
    decoder: the model in the decode layout.
  """
  dtype = decoder.compute_dtype
  merged = decoder.lora.kernels if decoder.lora else ()

  def copied(path: Any, old: Any, new: Any) -> Any:
    cast = new.dtype if path[-1].key == "scale" else jnp.dtype(dtype)
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    same_place = new.sharding.is_equivalent_to(old.sharding, len(new.shape))
    if cast == old.dtype and same_place and name not in merged:
      return None
    return jax.ShapeDtypeStruct(new.shape, cast, sharding=new.sharding)

  copies = decoder.abstract_params()
  return jax.tree.leaves(jax.tree_util.tree_map_with_path(copied, held, copies))


def cache(model: Model, rows: int, slots: int) -> KVCache:
  """The keys and values of `rows` rows of `slots` slots, in their places."""

  def place(leaf: Any) -> Any:
    axes = CACHE_AXES if len(leaf.shape) == len(CACHE_AXES) else ("batch", None)
    axes = model.layout.fitting(axes, leaf.shape)
    sharding = model.layout.sharding(axes, leaf.shape)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  shapes = jax.eval_shape(lambda: model.init_cache(rows, slots))
  return jax.tree.map(place, shapes)


def sampling(
  step: Step,
  sizes: Decoding,
  phase: Literal["sampling", "evaluation"],
  prefix: str,
) -> Iterable[Part]:
  """What is held while completions are drawn; names begin with `prefix`."""
  student = step.scorer.student
  yield from _decoder(
    step.decoder,
    student.abstract_held(),
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
  model: Model,
  held: Params,
  sizes: Decoding,
  phase: Literal["sampling", "evaluation"],
  prefix: str,
) -> Iterable[Part]:
  """What a model that draws needs while it does."""
  prefill, decoding = _PHASES[phase]
  slots = sizes.window + sizes.length
  rows = sizes.prompts * sizes.rollouts
  yield Part(
    name=f"{prefix}decode copy",
    size=shard_bytes(decode_copy(held, model)),
    phase=phase,
    exact=True,
    formula=(
      f"parameters x {itemsize(model)} bytes, where dtype or place changes"
    ),
  )
  yield Part(
    name=f"{prefix}keys and values of the prefill",
    size=2 * shard_bytes(cache(model, sizes.prompts, sizes.window)),
    phase=prefill,
    exact=False,
    formula=(
      f"{sizes.prompts} rows x {sizes.window} slots x layers x kv heads x head "
      f"size x 2 x {itemsize(model)} bytes, twice"
    ),
  )
  yield Part(
    name=f"{prefix}a layer of the prefill",
    size=_prefilled_layer(model, sizes.prompts, sizes.window),
    phase=prefill,
    exact=False,
    formula=(
      "tokens x width, twice, and the larger of attention and of tokens x "
      f"inner width x {itemsize(model)}, three times"
    ),
  )
  yield Part(
    name=f"{prefix}KV cache",
    size=shard_bytes(cache(model, rows, slots)),
    phase=decoding,
    exact=True,
    formula=(
      f"{rows} rows x {slots} slots x layers x kv heads x head size x 2 x "
      f"{itemsize(model)} bytes"
    ),
  )
  if sizes.rollouts > 1:
    yield Part(
      name=f"{prefix}KV cache of the prompts",
      size=shard_bytes(cache(model, sizes.prompts, slots)),
      phase=decoding,
      exact=False,
      formula="the same of the prompts, before the copy to rollouts",
    )
  yield Part(
    name=f"{prefix}logits of the draw",
    size=share(rows, model.layout) * columns(model) * 4 * 2,
    phase=decoding,
    exact=False,
    formula="rows x vocabulary x 4 bytes, twice",
  )


def _prefilled_layer(model: Model, prompts: int, window: int) -> int:
  """Bytes of the fuller half of a layer that reads all slots of the prompts."""
  config = local(model.config, model.layout.shards("heads"))
  rows = share(prompts, model.layout)
  tokens = rows * slots_of(window, model.layout) * itemsize(model)
  attention = attended(model, rows, window)
  attention += 2 * tokens * config.num_heads * config.head_size
  inner = 3 * tokens * config.intermediate_size
  return 2 * tokens * config.hidden_size + max(attention, inner)
