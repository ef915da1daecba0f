"""The student of a run: its model, and the weights that it starts with."""

import math
from collections.abc import Iterator

import jax

from opd_jax.config import TrainedModelSource
from opd_jax.models import Lora, Model, ModelConfig, hf
from opd_jax.sharding import Layout
from opd_jax.types import Params


def make(
  source: TrainedModelSource, architecture: ModelConfig, layout: Layout
) -> Model:
  """The model, with the adapters that are asked for.

  Raises:
    InputError: adapters that the architecture cannot have.
  """
  lora = None if source.lora is None else Lora.of(source.lora, architecture)
  return Model(
    architecture, layout, source.compute_dtype, remat=source.remat, lora=lora
  )


def start(source: TrainedModelSource, model: Model, seed: int) -> Params:
  """What is trained, at the start: the checkpoint's weights, or new adapters.

  Args:
    source: of the checkpoint.
    model: from `make`.
    seed: of the adapters.
  """
  if model.lora is not None:
    return model.init_adapters(jax.random.key(seed))
  return hf.load(source.path, model, "float32")


def load_base(source: TrainedModelSource, model: Model) -> Params | None:
  """The weights that adapters belong to; None for a model without adapters.

  Args:
    source: of the checkpoint.
    model: from `make`, in any layout.
  """
  if model.lora is None:
    return None
  return hf.load(source.path, model, source.compute_dtype)


def describe(model: Model) -> Iterator[str]:
  """What of the student is trained, in a line; nothing where all of it is."""
  if model.lora is None:
    return
  leaves = jax.tree.leaves(model.abstract_trained())
  count = sum(math.prod(leaf.shape) for leaf in leaves)
  yield (
    f"adapters of rank {model.lora.rank} on {', '.join(model.lora.targets)}: "
    f"{count:,} trained parameters"
  )
