"""A decoder as named parts, and its weights as a nested dict of arrays.

The parts are "embed", "layers", "final_norm" and, unless the output layer is
the embedding, "lm_head". The weights of all layers are stacked on a leading
axis L of "layers", and one block runs over them in a `jax.lax.scan`.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from opd_jax.models import block, layers
from opd_jax.models import lora as lora_lib
from opd_jax.models.config import ModelConfig
from opd_jax.models.lora import Lora
from opd_jax.types import Params

STACKED = "layers"


def _builders(
  config: ModelConfig, lora: Lora | None = None
) -> Mapping[str, Callable[[nnx.Rngs], nnx.Module]]:
  builders: dict[str, Callable[[nnx.Rngs], nnx.Module]] = {
    "embed": lambda rngs: layers.Embedding(config, rngs),
    STACKED: lambda rngs: block.Block(config, rngs),
    "final_norm": lambda rngs: layers.RMSNorm(config, config.hidden_size),
  }
  if lora is not None:
    builders[STACKED] = lambda rngs: lora_lib.attach(
      block.Block(config, rngs), lora
    )
  if not config.tie_embeddings:
    builders["lm_head"] = lambda rngs: layers.Embedding(config, rngs)
  return builders


@functools.cache
def _abstract(
  config: ModelConfig, lora: Lora | None = None
) -> dict[str, tuple[Any, Any]]:
  """Structure and abstract weights of each part."""
  parts = {}
  for name, build in _builders(config, lora).items():
    module = nnx.eval_shape(
      lambda build=build: build(nnx.Rngs(params=jax.random.key(0)))
    )
    parts[name] = nnx.split(module)
  return parts


def part(
  config: ModelConfig, params: Params, name: str, lora: Lora | None = None
) -> Any:
  """The module of one part with its weights (one layer's for "layers").

  Args:
    config: of the model.
    params: weights; with adapters, if `lora` is given.
    name: of the part.
    lora: which adapters these are.
  """
  structure, _ = _abstract(config, lora)[name]
  return nnx.merge(structure, params[name])


def shapes(config: ModelConfig, lora: Lora | None = None) -> Params:
  """A float32 `ShapeDtypeStruct` per weight, adapters of `lora` included."""
  return {
    name: jax.tree.map(
      lambda leaf, name=name: jax.ShapeDtypeStruct(
        (config.num_layers, *leaf.shape) if name == STACKED else leaf.shape,
        leaf.dtype,
      ),
      nnx.to_pure_dict(state),
    )
    for name, (_, state) in _abstract(config, lora).items()
  }


def axes(config: ModelConfig, lora: Lora | None = None) -> Params:
  """A tuple of logical axis names per weight, as `shapes`."""
  return {
    name: nnx.to_pure_dict(
      jax.tree.map(
        lambda leaf, name=name: (
          (STACKED, *leaf.get_metadata()["axes"])
          if name == STACKED
          else leaf.get_metadata()["axes"]
        ),
        state,
        is_leaf=lambda node: isinstance(node, nnx.Variable),
      )
    )
    for name, (_, state) in _abstract(config, lora).items()
  }


def init(config: ModelConfig, key: jax.Array) -> Params:
  """Random float32 weights: normal, deviation 0.02; norms, biases neutral."""
  params = {}
  builders = _builders(config)
  for (name, build), part_key in zip(
    builders.items(), jax.random.split(key, len(builders)), strict=True
  ):

    def weights(key: jax.Array, build=build) -> Params:
      module = build(nnx.Rngs(params=key))
      return nnx.to_pure_dict(nnx.state(module))

    if name == STACKED:
      keys = jax.random.split(part_key, config.num_layers)
      params[name] = jax.vmap(weights)(keys)
    else:
      params[name] = weights(part_key)
  return params
