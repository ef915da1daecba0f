"""What lies in the memory of a device, and how arrays are spread over them."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from opd_jax.models import Model, ModelConfig
from opd_jax.models.places import Blocks, scored
from opd_jax.sharding import HOST_MEMORY, Layout
from opd_jax.step import Step

# A model that draws reads the prompts ("prefill"), then draws token by token
# ("decoding"); what is marked "sampling" is there in both. An update first runs
# all models forward, then loops over the vocabulary, then runs backward; what
# is marked "update" is there in all three.
Phase = Literal[
  "always",
  "sampling",
  "prefill",
  "decoding",
  "evaluation",
  "evaluation prefill",
  "evaluation decoding",
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


def shard_bytes(tree: Any) -> int:
  """Bytes of one device's shards of arrays or `ShapeDtypeStruct`s.

  What lies in the host's memory is not counted.
  """
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape))
    * jnp.dtype(leaf.dtype).itemsize
    for leaf in jax.tree.leaves(tree)
    if leaf.sharding.memory_kind != HOST_MEMORY
  )


def frozen(step: Step) -> dict[str, Model]:
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


def local(config: ModelConfig, shards: int) -> ModelConfig:
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


def share(rows: int, layout: Layout) -> int:
  """Rows on one device; too few to spread are on all of them."""
  shards = layout.shards("batch")
  return rows if rows % shards else rows // shards


def slots_of(slots: int, layout: Layout) -> int:
  """Slots of a row on one device."""
  return math.ceil(slots / layout.shards("sequence"))


def attended(model: Model, rows: int, slots: int) -> int:
  """Bytes of the scores of attention, of rows on one device.

  In blocks, with the queries and the float32 sums of what they mix.
  """
  config = local(model.config, model.layout.shards("heads"))
  size = 2 * scored(slots, model.layout) * 4
  if Blocks.of(slots, model.layout) is not None:
    held = slots_of(slots, model.layout) * config.head_size
    size += held * (4 + itemsize(model))
  return rows * config.num_heads * size


def columns(model: Model) -> int:
  """Columns of the vocabulary on one device."""
  return model.config.padded_vocab_size // model.layout.shards("vocab")


def itemsize(model: Model) -> int:
  """Bytes of a number of the compute dtype."""
  return jnp.dtype(model.compute_dtype).itemsize


def size_text(size: int) -> str:
  """Bytes for people."""
  for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
    if size >= unit:
      return f"{size / unit:,.1f} {name}"
  return f"{size} bytes"
