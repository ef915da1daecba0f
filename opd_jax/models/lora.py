"""Low-rank adapters of the products of a model (LoRA, arXiv:2106.09685).

A product y = x W with an adapter is y = x W + (alpha / rank) (x A) B. Only A
and B are trained. B starts at 0, so that the start is the model itself, and A
like that of PEFT: uniform in [-1 / sqrt(n), 1 / sqrt(n)] for n inputs.

The weights of a model with adapters are its own, "base", and beside the kernel
of each target `adapter.a` [L, *inputs, rank] and `adapter.b` [L, rank,
*outputs], both float32.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from opd_jax.config import LoraConfig
from opd_jax.errors import InputError
from opd_jax.models import layers
from opd_jax.models.config import ModelConfig
from opd_jax.types import Params

# Products of a layer: their names in PEFT, and where they are here.
TARGETS: Mapping[str, str] = {
  "q_proj": "attention.query",
  "k_proj": "attention.key",
  "v_proj": "attention.value",
  "o_proj": "attention.output",
  "gate_proj": "mlp.gate",
  "up_proj": "mlp.up",
  "down_proj": "mlp.down",
}

_ADAPTER = "adapter"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
  """Which products have adapters, and of what form.

  Attributes:
    rank: of each.
    alpha: what an adapter adds is multiplied by alpha / rank.
    targets: keys of `TARGETS`, in its order.
  """

  rank: int
  alpha: float
  targets: tuple[str, ...]

  @classmethod
  def of(cls, config: LoraConfig, model: ModelConfig) -> "Lora":
    """Adapters of a model as a config asks for them.

    Raises:
      InputError: a target that the model has no adapters for.
    """
    possible = tuple(
      name
      for name, place in TARGETS.items()
      if model.experts is None or not place.startswith("mlp.")
    )
    if config.targets == ("all-linear",):
      return cls(rank=config.rank, alpha=config.alpha, targets=possible)
    for name in config.targets:
      if name not in possible:
        experts = " (experts and their router have none)"
        raise InputError(
          f"student.lora.targets: {name!r} is none of the products of a "
          f"{model.family} model that may have an adapter"
          f"{experts if model.experts is not None else ''}; choose from "
          f'{", ".join(possible)}, or take "all-linear" for all of them'
        )
    targets = tuple(name for name in possible if name in config.targets)
    return cls(rank=config.rank, alpha=config.alpha, targets=targets)

  @property
  def scale(self) -> float:
    """What an adapter adds is multiplied by this."""
    return self.alpha / self.rank

  @property
  def kernels(self) -> frozenset[str]:
    """Dotted paths of the weights that adapters change."""
    return frozenset(f"layers.{TARGETS[name]}.kernel" for name in self.targets)


class Adapter(nnx.Module):
  """scale * (x A) B, of the inputs and outputs of a product."""

  def __init__(self, lora: Lora, linear: layers.Linear):
    """An adapter that adds nothing; see `init` for the start of a training."""
    kernel, inputs = linear.kernel, linear.inputs
    shape, axes = kernel.shape, kernel.get_metadata()["axes"]
    self.a = nnx.Param(
      jnp.zeros((*shape[:inputs], lora.rank)), axes=(*axes[:inputs], None)
    )
    self.b = nnx.Param(
      jnp.zeros((lora.rank, *shape[inputs:])), axes=(None, *axes[inputs:])
    )
    self.scale = lora.scale

  def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """What is added to the product of [n, *inputs], in the dtype of x."""
    a, b = self.a[...].astype(x.dtype), self.b[...].astype(x.dtype)
    inputs = "cdef"[: a.ndim - 1]
    outputs = "ghij"[: b.ndim - 1]
    inner = layers.product(f"n{inputs},{inputs}r->nr", x, a)
    return layers.product(f"nr,r{outputs}->n{outputs}", inner, b) * self.scale


def attach(block: Any, lora: Lora) -> Any:
  """A layer, its targets having adapters."""
  for target in lora.targets:
    linear = block
    for name in TARGETS[target].split("."):
      linear = getattr(linear, name)
    linear.adapter = Adapter(lora, linear)
  return block


def only(tree: Any) -> Any:
  """The adapters of a tree of weights, or of what is said of weights."""
  found = {}
  for name, part in tree.items():
    if name == _ADAPTER:
      found[name] = part
    elif isinstance(part, Mapping) and (inner := only(part)):
      found[name] = inner
  return found


def combine(base: Params, adapters: Params) -> Params:
  """Weights and the adapters of their products as one tree."""
  combined = dict(base)
  for name, part in adapters.items():
    inside = name in combined
    combined[name] = combine(combined[name], part) if inside else part
  return combined


def init(abstract: Any, key: jax.Array) -> Params:
  """The adapters at the start, from their shapes; for use inside jit."""
  leaves, structure = jax.tree.flatten_with_path(abstract)

  def start(index: int, path: Any, leaf: Any) -> Array:
    if path[-1].key == "b":
      return jnp.zeros(leaf.shape, jnp.float32)
    bound = 1 / math.sqrt(math.prod(leaf.shape[1:-1]))
    return jax.random.uniform(
      jax.random.fold_in(key, index), leaf.shape, minval=-bound, maxval=bound
    )

  return jax.tree.unflatten(
    structure, [start(index, *leaf) for index, leaf in enumerate(leaves)]
  )


def merge(params: Params, lora: Lora, dtype: str) -> Params:
  """Weights without adapters that give the same; for use inside jit.

  W + scale * A B is computed in float32, layer by layer, and cast to `dtype`;
  weights without an adapter are as they were.
  """
  kernels = jax.lax.map(
    lambda one: {
      name: merged_kernel(linear, lora).astype(dtype)
      for name, linear in one.items()
    },
    dict(_adapted(params)),
  )

  def rebuild(tree: Any, prefix: str) -> Any:
    if not isinstance(tree, Mapping):
      return tree
    rebuilt = {
      name: rebuild(part, f"{prefix}{name}.")
      for name, part in tree.items()
      if name != _ADAPTER
    }
    if prefix in kernels:
      rebuilt["kernel"] = kernels[prefix]
    return rebuilt

  return rebuild(params, "")


def merged_kernel(linear: Params, lora: Lora) -> Float[Array, "..."]:
  """The kernel of one layer's product with its adapter in it, float32."""
  a, b = linear[_ADAPTER]["a"], linear[_ADAPTER]["b"]
  low_rank = jnp.tensordot(a, b, axes=1, precision=jax.lax.Precision.HIGHEST)
  return linear["kernel"].astype(jnp.float32) + lora.scale * low_rank


def _adapted(params: Params, prefix: str = "") -> Iterator[tuple[str, Params]]:
  """Kernel and adapter of each product that has one, by the product's path."""
  if _ADAPTER in params:
    kept = ("kernel", _ADAPTER)
    yield prefix, {name: params[name] for name in kept}
    return
  for name, part in params.items():
    if isinstance(part, Mapping):
      yield from _adapted(part, f"{prefix}{name}.")
