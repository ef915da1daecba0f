"""The weights of a model: their shapes, places, first values, working copy."""

import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import NamedSharding
from jaxtyping import Array, PRNGKeyArray

from opd_jax.errors import InputError
from opd_jax.models import lora as lora_lib
from opd_jax.models import quantize, transformer
from opd_jax.models.config import ModelConfig
from opd_jax.models.lora import Lora
from opd_jax.sharding import HOST_MEMORY, Layout
from opd_jax.types import Params


@dataclasses.dataclass(frozen=True)
class WeightSpec:
  """Which weights a model has, and where they lie; hashable.

  Attributes:
    config: sizes and variants.
    layout: where weights and activations are placed.
    compute_dtype: "float32" or "bfloat16", of activations and of weights where
      they are used; norms, rotations, softmax and logits are float32 in both.
    weight_dtype: "int8" for kernels of the layers as `quantize` holds them, of
      a model that is not trained; None for floats.
    offload: the kernels of the layers lie in the hosts' memory, of a model not
      trained; inside a loop over the layers each is brought to the device.
    lora: the adapters that weights may have; those without are the base, or
      merged. None if there are never any.
  """

  config: ModelConfig
  layout: Layout
  compute_dtype: str = "float32"
  _: dataclasses.KW_ONLY
  weight_dtype: str | None = None
  offload: bool = False
  lora: Lora | None = None

  def logical_axes(self) -> Params:
    """A tuple of logical axis names per weight, without adapters."""
    return transformer.axes(self.config, int8=self._int8)

  def abstract_params(self, dtype: str = "float32") -> Params:
    """A `ShapeDtypeStruct` with its sharding per weight, without adapters.

    Args:
      dtype: of all weights but int8 kernels and their scales.

    Raises:
      InputError: the mesh does not divide a dimension, or its devices cannot
        read what is offloaded.
    """
    shapes = transformer.shapes(self.config, int8=self._int8)
    return self._abstract(shapes, self.logical_axes(), dtype)

  def abstract_held(self) -> Params:
    """The same of a trained model's weights: float32, unless for adapters."""
    return self.abstract_params(self.compute_dtype if self.lora else "float32")

  def abstract_trained(self) -> Params:
    """The same of what is trained: float32 weights, or adapters alone."""
    if self.lora is None:
      return self.abstract_params()
    shapes, axes = (
      lora_lib.only(describe(self.config, self.lora))
      for describe in (transformer.shapes, transformer.axes)
    )
    return self._abstract(shapes, axes, "float32")

  def _abstract(self, shapes: Params, axes: Params, dtype: str) -> Params:
    places = self.layout.tree_shardings(axes, shapes)
    if self.offload:
      places = jax.tree.map_with_path(_on_host, places)
    return jax.tree.map_with_path(
      lambda path, leaf, place: jax.ShapeDtypeStruct(
        leaf.shape,
        leaf.dtype if quantize.decides_dtype(path, leaf) else dtype,
        sharding=place,
      ),
      shapes,
      places,
    )

  def init(self, key: PRNGKeyArray, dtype: str = "float32") -> Params:
    """Random weights, made in their places; the key fixes every value."""
    abstract = self.abstract_params(dtype)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    def make(key: PRNGKeyArray) -> Params:
      params = transformer.init(self.config, key, self._int8)
      return jax.tree.map(
        lambda leaf, like: leaf.astype(like.dtype), params, abstract
      )

    return jax.jit(make, out_shardings=shardings)(key)

  def init_adapters(self, key: PRNGKeyArray) -> Params:
    """Adapters that add nothing yet; see `lora`."""
    abstract = self.abstract_trained()
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    start = functools.partial(lora_lib.init, abstract)
    return jax.jit(start, out_shardings=shardings)(key)

  def working_copy(self, params: Params) -> Params:
    """Weights in the compute dtype and in this layout; for use inside jit.

    Scales of norms keep their dtype: they are applied in float32, and rounding
    them would only add to the mismatch between decoding and scoring. So do int8
    kernels and their scales. Adapters are merged.
    """
    lora = self._lora_of(params)
    if lora is not None:
      params = lora_lib.merge(params, lora, self.compute_dtype)

    def cast(path: Any, leaf: Array) -> Array:
      return leaf if _keeps(path, leaf) else leaf.astype(self.compute_dtype)

    places = self.layout.tree_shardings(self.logical_axes(), params)
    copy = jax.tree_util.tree_map_with_path(cast, params)
    return jax.lax.with_sharding_constraint(copy, places)

  def is_working_copy(self, params: Params) -> bool:
    """Whether `working_copy` would change neither dtype nor place."""
    if self._lora_of(params) is not None:
      return False
    places = self.layout.tree_shardings(self.logical_axes(), params)
    found = jax.tree_util.tree_map_with_path(
      lambda path, leaf, place: (
        (_keeps(path, leaf) or leaf.dtype == self.compute_dtype)
        and leaf.sharding.is_equivalent_to(place, leaf.ndim)
      ),
      params,
      places,
    )
    return all(jax.tree.leaves(found))

  @property
  def _int8(self) -> bool:
    return self.weight_dtype == "int8"

  def _lora_of(self, params: Params) -> Lora | None:
    """The adapters that these weights have."""
    return self.lora if self.lora and lora_lib.only(params) else None


def _on_host(path: Any, place: NamedSharding) -> NamedSharding:
  """Where an offloaded model keeps a weight: kernels of layers on the host.

  The rest is small, and a TPU cannot cut single rows out of the host's memory.
  """
  if path[0].key != transformer.STACKED or path[-1].key != quantize.KERNEL:
    return place
  try:
    return place.with_memory_kind(HOST_MEMORY)
  except ValueError as error:
    raise InputError(
      f"offload = True, but the devices here cannot read the host's memory: "
      f"{error}; set it to False"
    ) from error


def _keeps(path: Any, leaf: Array) -> bool:
  """Whether a weight has the same dtype in a working copy."""
  return path[-1].key == "scale" or quantize.decides_dtype(path, leaf)
