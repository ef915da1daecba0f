"""A mixture of experts in place of the MLP (arXiv:1701.06538).

A router picks `per_token` of E small MLPs for each token; their outputs are
added with the router's probabilities as weights. No token is dropped, and none
depends on its batch mates: tokens are sorted by expert into blocks of rows that
all belong to one expert, and the blocks run one after the other. A block that
is not full is padded, so the operations are those of the chosen experts and at
most one block for each of the others.

Experts are spread over the mesh axis "expert", and so are rows of the batch.
Every device gathers the tokens along that axis, runs its own experts on those
that chose them, and gets the sum over the axis of its own rows.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Int8

from opd_jax.models import layers, quantize
from opd_jax.models.config import Experts as ExpertsConfig
from opd_jax.models.config import ModelConfig
from opd_jax.sharding import Axes, Layout
from opd_jax.types import Params

_MAX_BLOCK = 256
_MIN_BLOCK = 16

# Where a block of experts keeps its router.
ROUTER = "router"

# The kernels of all experts: gate and up [E, D, F], down [E, F, D]. Those held
# as int8 come with their scales.
Kernel = (
  Float[Array, "E I O"] | tuple[Int8[Array, "E I O"], Float[Array, "E O"]]
)
Kernels = tuple[Kernel, Kernel, Kernel]


class Stack(nnx.Module):
  """One kernel per expert."""

  def __init__(self, shape: tuple[int, ...], axes: Axes, rngs: nnx.Rngs):
    kernel = layers.INIT_SCALE * jax.random.normal(rngs.params(), shape)
    self.kernel = nnx.Param(kernel, axes=axes)
    self.kernel_scale = nnx.data(None)  # Of an int8 kernel, see `quantize`.

  def weights(self, dtype: Any) -> Kernel:
    """In a compute dtype; int8 stays, since one expert runs at a time."""
    if self.kernel_scale is None:
      return self.kernel[...].astype(dtype)
    return self.kernel[...], self.kernel_scale[...]


class Experts(nnx.Module):
  """sum over e in top-k of p_e * down_e(activation(gate_e(x)) * up_e(x)).

  p is the softmax of the router over all experts, in float32; `renormalize`
  divides by the sum over the chosen ones. Gradient flows through p_e, not
  through the choice.
  """

  def __init__(
    self, config: ModelConfig, experts: ExpertsConfig, rngs: nnx.Rngs
  ):
    width, wide = config.hidden_size, experts.size
    self.router = layers.Linear(
      (width,), (experts.count,), ("embed", None), bias=False, rngs=rngs
    )
    up = ("experts", "embed", "ffw")
    self.gate = Stack((experts.count, width, wide), up, rngs)
    self.up = Stack((experts.count, width, wide), up, rngs)
    self.down = Stack(
      (experts.count, wide, width), ("experts", "ffw", "embed"), rngs
    )
    self.experts = experts
    self.activation = config.activation

  def __call__(
    self,
    x: Float[Array, "B T D"],
    layout: Layout,
    layer: Int[Array, ""] | None = None,
  ) -> Float[Array, "B T D"]:
    """Each token by itself.

    Args:
      x: tokens.
      layout: says which device runs which expert.
      layer: which of all layers' kernels to run, where `gate`, `up` and `down`
        hold those ([L, E, ...]): so only the experts that are chosen are read.
    """
    logits = self.router(x).astype(jnp.float32)
    weights, chosen = jax.lax.top_k(
      jax.nn.softmax(logits, axis=-1), self.experts.per_token
    )
    if self.experts.renormalize:
      weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    gate, up, down = (
      stack.weights(x.dtype) for stack in (self.gate, self.up, self.down)
    )
    kernels: Kernels = (gate, up, down)
    over = layout.mesh_axes("experts")
    apart = tuple(
      axis for axis in layout.mesh_axes("batch") if axis not in over
    )
    spread = len(x) % layout.shards("batch") == 0
    rows = PartitionSpec(apart if spread else None)
    inner = layout.computing()
    place = functools.partial(_place, inner, stacked=layer is not None)
    places = (
      place(gate, None, "ffw"),
      place(up, None, "ffw"),
      place(down, "ffw", None),
    )

    def local(
      x: Any, weights: Any, chosen: Any, kernels: Kernels, layer: Any
    ) -> Any:
      first = jax.lax.axis_index(over) * _count(kernels, layer)
      mixed = mix(x, weights, chosen - first, kernels, self.activation, layer)
      return jax.lax.psum(mixed, over + inner.mesh_axes("ffw"))

    return jax.shard_map(
      local,
      mesh=layout.mesh,
      in_specs=(rows, rows, rows, places, PartitionSpec()),
      out_specs=rows,
      check_vma=False,
    )(x, weights, chosen, kernels, layer)


def mix(
  x: Float[Array, "B T D"],
  weights: Float[Array, "B T K"],
  chosen: Int[Array, "B T K"],
  kernels: Kernels,
  activation: str,
  layer: Int[Array, ""] | None = None,
) -> Float[Array, "B T D"]:
  """The weighted sum of the chosen experts that are among these kernels.

  Args:
    x: tokens.
    weights: of the choices.
    chosen: indices of experts; those outside [0, E) add nothing.
    kernels: of E experts; with a layer, of those of L layers.
    activation: of the gate.
    layer: whose experts to run; None where the kernels are of one.
  """
  count, width = _count(kernels, layer), x.shape[-1]
  tokens = x.reshape(-1, width)
  expert = chosen.reshape(-1)
  expert = jnp.where((expert >= 0) & (expert < count), expert, count)
  choices = expert.size
  block = block_size(choices, count)
  blocks = min(choices, -(-choices // block) + count)
  slots, owner, used = _slots(expert, count, block, blocks)
  if layer is not None:
    kernels = jax.tree.map(lambda k: k.reshape(-1, *k.shape[2:]), kernels)
    owner = owner + layer * count
  # A gather per slot, so that its transpose writes every choice by itself.
  source = (
    jnp.full(blocks * block, choices)
    .at[slots]
    .set(jnp.arange(choices), mode="drop")
  )
  rows = jnp.repeat(tokens, choices // len(tokens), axis=0)
  rows = rows.at[source].get(mode="fill", fill_value=0)
  outputs = _run(activation, block, rows, kernels, owner, used)
  mixed = outputs.at[slots].get(mode="fill", fill_value=0)
  mixed = mixed.reshape(*weights.shape, width)
  mixed = mixed * weights[..., None].astype(x.dtype)
  return jnp.sum(mixed, axis=-2)


def block_size(choices: int, experts: int) -> int:
  """Rows of a block: at most about a quarter of an expert's share is padding.

  A power of two in [16, 256]: products of TPUs take no fewer rows at a time.
  """
  share = max(choices // (4 * experts), 1)
  return min(max(1 << share.bit_length() - 1, _MIN_BLOCK), _MAX_BLOCK)


def _slots(
  expert: Int[Array, " C"], count: int, block: int, blocks: int
) -> tuple[Int[Array, " C"], Int[Array, " blocks"], Int[Array, ""]]:
  """Where the choices lie when each expert's begin with a block.

  Args:
    expert: of each choice, in [0, count]; `count` for none.
    count: E.
    block: rows of a block.
    blocks: that there may be.

  Returns:
    The slot of each choice (beyond the last for those without an expert), the
    expert of each block, and how many blocks are in use.
  """
  order = jnp.argsort(expert, stable=True)
  sizes = jnp.bincount(expert, length=count + 1)[:count]
  starts = jnp.cumsum(sizes) - sizes
  padded = -(-sizes // block)
  ends = jnp.cumsum(padded)
  by_expert = expert[order]
  real = by_expert < count
  here = jnp.where(real, by_expert, 0)
  rank = jnp.arange(expert.size) - starts[here]
  slot = (ends - padded)[here] * block + rank
  slots = (
    jnp.zeros_like(expert)
    .at[order]
    .set(jnp.where(real, slot, blocks * block), unique_indices=True)
  )
  owner = jnp.searchsorted(ends, jnp.arange(blocks), side="right")
  return slots, jnp.minimum(owner, count - 1), ends[-1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(
  activation: str,
  block: int,
  rows: Float[Array, "S D"],
  kernels: Kernels,
  owner: Int[Array, " blocks"],
  used: Int[Array, ""],
) -> Float[Array, "S D"]:
  """Each block of rows through the MLP of its expert."""

  def step(index: Any, outputs: Any) -> Any:
    start = index * block
    inputs = jax.lax.dynamic_slice_in_dim(rows, start, block)
    one = _of(kernels, owner[index])
    return jax.lax.dynamic_update_slice_in_dim(
      outputs, _mlp(activation, inputs, one), start, 0
    )

  return layers.turns(used, len(owner), step, jnp.zeros_like(rows))


def _run_forward(
  activation: str, block: int, rows: Any, kernels: Any, owner: Any, used: Any
) -> tuple[Any, Any]:
  outputs = _run(activation, block, rows, kernels, owner, used)
  return outputs, (rows, kernels, owner, used)


def _run_backward(
  activation: str, block: int, kept: Any, slopes: Any
) -> tuple[Any, Any, None, None]:
  """Every block again, for the slopes of its rows and of its expert.

  The sum over an expert's blocks is float32.
  """
  rows, kernels, owner, used = kept

  def step(index: Any, carry: Any) -> Any:
    to_rows, to_kernels = carry
    start = index * block
    cut = functools.partial(
      jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=block
    )
    _, pull = jax.vjp(
      functools.partial(_mlp, activation),
      cut(rows),
      _of(kernels, owner[index]),
    )
    to_inputs, to_one = pull(cut(slopes))
    to_rows = jax.lax.dynamic_update_slice_in_dim(to_rows, to_inputs, start, 0)
    to_kernels = jax.tree.map(
      lambda total, new: total.at[owner[index]].add(new.astype(total.dtype)),
      to_kernels,
      to_one,
    )
    return to_rows, to_kernels

  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), kernels)
  to_rows, to_kernels = layers.turns(
    used, len(owner), step, (jnp.zeros_like(rows), zeros)
  )
  to_kernels = jax.tree.map(
    lambda slope, kernel: slope.astype(kernel.dtype), to_kernels, kernels
  )
  return to_rows, to_kernels, None, None


_run.defvjp(_run_forward, _run_backward)


def _place(
  layout: Layout,
  kernel: Kernel,
  inputs: str | None,
  outputs: str | None,
  stacked: bool,
) -> Any:
  """The place of a kernel, and of its scales."""
  experts = ("layers", "experts") if stacked else ("experts",)
  if not isinstance(kernel, tuple):
    return layout.spec((*experts, inputs, outputs), kernel.shape)
  values, scale = kernel
  return (
    layout.spec((*experts, inputs, outputs), values.shape),
    layout.spec((*experts, outputs), scale.shape),
  )


def _count(kernels: Kernels, layer: Int[Array, ""] | None) -> int:
  """Experts of a layer."""
  return jax.tree.leaves(kernels)[0].shape[0 if layer is None else 1]


def apart(weights: Params) -> tuple[Params, Params]:
  """The kernels of all layers' experts, and the other weights of the layers.

  Returns:
    The other weights, and the part with the kernels; empty without experts.
  """
  mlp = weights["mlp"]
  if ROUTER not in mlp:
    return weights, {}
  kernels = {name: part for name, part in mlp.items() if name != ROUTER}
  return {**weights, "mlp": {ROUTER: mlp[ROUTER]}}, kernels


def together(weights: Params, kernels: Params) -> Params:
  """The inverse of `apart`."""
  return {**weights, "mlp": {**weights["mlp"], **kernels}}


def _of(kernels: Kernels, expert: Int[Array, ""]) -> Kernels:
  return jax.tree.map(
    lambda kernel: jax.lax.dynamic_index_in_dim(kernel, expert, keepdims=False),
    kernels,
  )


def _mlp(
  activation: str, x: Float[Array, "S D"], kernels: Kernels
) -> Float[Array, "S D"]:
  def times(x: jax.Array, kernel: Kernel) -> jax.Array:
    if not isinstance(kernel, tuple):
      return layers.product("sd,df->sf", x, kernel)
    values, scale = kernel
    y = layers.product("sd,df->sf", x, values.astype(x.dtype))
    return quantize.rescale(y, scale)

  gate, up, down = kernels
  activate = layers.ACTIVATIONS[activation]
  return times(activate(times(x, gate)) * times(x, up), down)
