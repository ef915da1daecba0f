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

from opd_jax.models import block, experts, layers, quantize
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


def _hold_int8(module: nnx.Module) -> None:
  """Quantizes the kernels of a part; see `quantize`."""
  for path, owner in list(nnx.iter_modules(module)):
    if isinstance(owner, layers.Linear) and path[-1] != experts.ROUTER:
      quantize.hold(owner, tuple(range(owner.inputs)))
    elif isinstance(owner, experts.Stack):
      quantize.hold(owner, (1,))


@functools.cache
def _abstract(
  config: ModelConfig, lora: Lora | None, int8: bool
) -> dict[str, tuple[Any, Any]]:
  """Structure and abstract weights of each part."""

  def make(build: Callable[[nnx.Rngs], nnx.Module]) -> nnx.Module:
    module = build(nnx.Rngs(params=jax.random.key(0)))
    if int8:
      _hold_int8(module)
    return module

  return {
    name: nnx.split(nnx.eval_shape(functools.partial(make, build)))
    for name, build in _builders(config, lora).items()
  }


def part(
  config: ModelConfig,
  weights: Params,
  name: str,
  lora: Lora | None = None,
  int8: bool = False,
) -> Any:
  """The module of one part with its weights (one layer's for "layers").

  Args:
    config: of the model.
    weights: of the part; with adapters, if `lora` is given.
    name: of the part.
    lora: which adapters these are.
    int8: whether kernels are held as `quantize` does.
  """
  structure, _ = _abstract(config, lora, int8)[name]
  return nnx.merge(structure, weights)


def shapes(
  config: ModelConfig, lora: Lora | None = None, int8: bool = False
) -> Params:
  """A `ShapeDtypeStruct` per weight, float32 but for int8 kernels.

  Those of the adapters of `lora` are included.
  """
  return {
    name: jax.tree.map(
      lambda leaf, name=name: jax.ShapeDtypeStruct(
        (config.num_layers, *leaf.shape) if name == STACKED else leaf.shape,
        leaf.dtype,
      ),
      nnx.to_pure_dict(state),
    )
    for name, (_, state) in _abstract(config, lora, int8).items()
  }


def axes(
  config: ModelConfig, lora: Lora | None = None, int8: bool = False
) -> Params:
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
    for name, (_, state) in _abstract(config, lora, int8).items()
  }


def init(config: ModelConfig, key: jax.Array, int8: bool = False) -> Params:
  """Random float32 weights: normal, deviation 0.02; norms, biases neutral.

  With `int8`, kernels are those of the same weights.
  """
  params = {}
  builders = _builders(config)
  for (name, build), part_key in zip(
    builders.items(), jax.random.split(key, len(builders)), strict=True
  ):

    def weights(key: jax.Array, build=build) -> Params:
      module = build(nnx.Rngs(params=key))
      if int8:
        _hold_int8(module)
      return nnx.to_pure_dict(nnx.state(module))

    if name == STACKED:
      keys = jax.random.split(part_key, config.num_layers)
      params[name] = jax.vmap(weights)(keys)
    else:
      params[name] = weights(part_key)
  return params
