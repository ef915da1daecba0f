"""The modules of a decoder.

A module holds the weights of one layer. Every parameter carries the logical
names of its dimensions as the metadata `axes`. Weights are cast to the compute
dtype where they are used; norms, rotations and softmax are float32 inside.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from opd_jax.models import quantize, rope
from opd_jax.models.config import ModelConfig
from opd_jax.sharding import Axes

INIT_SCALE = 0.02

# Keys and values of one layer, heads before slots: what products read in order.
KeyValue = tuple[Float[Array, "B M S H"], Float[Array, "B M S H"]]


def product(equation: str, *operands: jax.Array, dtype=None) -> jax.Array:
  """`jnp.einsum` whose float32 is float32 on every accelerator.

  Args:
    equation: as for `jnp.einsum`.
    *operands: arrays of one dtype.
    dtype: of the result and of the accumulation; None keeps the operands'.
  """
  exact = operands[0].dtype == jnp.float32
  return jnp.einsum(
    equation,
    *operands,
    precision=jax.lax.Precision.HIGHEST if exact else None,
    preferred_element_type=dtype,
  )


def _broadcast(weights: jax.Array, x: jax.Array) -> jax.Array:
  """Leading dimensions of size 1, so that weights fit the last ones of x."""
  return jnp.expand_dims(weights, range(x.ndim - weights.ndim))


def turns(
  count: Int[Array, ""],
  most: int,
  body: Callable[[Array, Any], Any],
  start: Any,
) -> Any:
  """`fori_loop(0, min(count, most), body, start)`.

  The bound is in the loop's own condition, where whoever reads the compiled
  program finds it (`plan.hlo`).
  """

  def going(state: tuple[Array, Any]) -> Array:
    return (state[0] < count) & (state[0] < most)

  def turn(state: tuple[Array, Any]) -> tuple[Array, Any]:
    return state[0] + 1, body(*state)

  return jax.lax.while_loop(going, turn, (jnp.int32(0), start))[1]


class RMSNorm(nnx.Module):
  """x / sqrt(mean(x^2) + eps) * scale, over the last dimension.

  With `norm_offset` the factor is 1 + scale.
  """

  def __init__(self, config: ModelConfig, size: int, axes: Axes = ("norm",)):
    self.offset = 1.0 if config.norm_offset else 0.0
    self.scale = nnx.Param(jnp.full(size, 1.0 - self.offset), axes=axes)
    self.eps = config.norm_eps

  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Norms the last dimension; float32 inside."""
    wide = x.astype(jnp.float32)
    square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(square + self.eps)
    scale = _broadcast(self.scale[...], x).astype(jnp.float32) + self.offset
    return (normed * scale).astype(x.dtype)


class Linear(nnx.Module):
  """Contracts the last dimensions of x with the first of a kernel.

  `lora.attach` may add an adapter, whose output is added to the product.

  Args:
    inputs: sizes of the contracted dimensions.
    outputs: sizes of the dimensions in their place.
    axes: logical names of the kernel's dimensions, inputs first.
    bias: adds a bias of the shape of `outputs`.
    rngs: draws the start.
  """

  def __init__(
    self,
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    axes: Axes,
    *,
    bias: bool,
    rngs: nnx.Rngs,
  ):
    kernel = INIT_SCALE * jax.random.normal(rngs.params(), inputs + outputs)
    self.kernel = nnx.Param(kernel, axes=axes)
    self.bias = (
      nnx.Param(jnp.zeros(outputs), axes=axes[len(inputs) :]) if bias else None
    )
    self.kernel_scale = nnx.data(None)  # Of an int8 kernel, see `quantize`.
    dims = "abcd"[: len(inputs) + len(outputs)]
    contracted, free = dims[: len(inputs)], dims[len(inputs) :]
    self.equation = f"n{contracted},{dims}->n{free}"
    self.inputs = len(inputs)
    self.adapter: Callable[[jax.Array], jax.Array] | None = nnx.data(None)

  def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The product, in the dtype of x."""
    # As one matrix: the gradient of a product of [B, T, D] is laid out badly.
    lead = x.shape[: x.ndim - self.inputs]
    flat = x.reshape(-1, *x.shape[x.ndim - self.inputs :])
    y = product(self.equation, flat, self.kernel[...].astype(x.dtype))
    if self.kernel_scale is not None:
      y = quantize.rescale(y, self.kernel_scale[...])
    if self.adapter is not None:
      y = y + self.adapter(flat)
    y = y.reshape(*lead, *y.shape[1:])
    if self.bias is None:
      return y
    return y + _broadcast(self.bias[...], y).astype(y.dtype)


class Embedding(nnx.Module):
  """A vector per vocabulary id; the rows of padding are zero."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    shape = (config.padded_vocab_size, config.hidden_size)
    rows = INIT_SCALE * jax.random.normal(rngs.params(), shape)
    real = jnp.arange(shape[0])[:, None] < config.vocab_size
    self.embedding = nnx.Param(
      jnp.where(real, rows, 0.0), axes=("vocab", "embed")
    )

  def table(self, dtype: str) -> Float[Array, "V D"]:
    """All vectors, in a compute dtype."""
    return self.embedding[...].astype(dtype)


def soft_cap(scores: Float[Array, "..."], cap: float) -> Float[Array, "..."]:
  """The scores bent into (-cap, cap): cap * tanh(scores / cap)."""
  return jnp.tanh(scores / cap) * cap


def visible(
  queries: Int[Array, "B T"], keys: Int[Array, "B S"], window: int | None
) -> Bool[Array, "B T S"]:
  """Which slots a query may see, by positions; see `Model`."""
  queries, keys = queries[:, :, None], keys[:, None, :]
  seen = (keys >= 0) & (keys <= queries)
  return seen if window is None else seen & (keys > queries - window)


def attend(
  query: Float[Array, "B T N H"],
  keys: Float[Array, "B M S H"],
  values: Float[Array, "B M S H"],
  visible: Bool[Array, "B T S"],
  scalar: float | None = None,
  cap: float | None = None,
) -> Float[Array, "B T N H"]:
  """softmax(q k / sqrt(scalar)) v over the visible slots, in float32.

  Each of the M key/value heads serves N / M consecutive query heads. A query
  that sees nothing gets a mean of the values, not NaN.

  Args:
    query: rotated.
    keys: rotated.
    values: of the same slots.
    visible: the slots that each query sees.
    scalar: None for H.
    cap: see `soft_cap`, of the scores; None for none.
  """
  batch, length, heads, size = query.shape
  kv_heads = keys.shape[1]
  grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, size)
  scores = product("btmgh,bmsh->bmgts", grouped, keys, dtype=jnp.float32)
  scores = scores / math.sqrt(size if scalar is None else scalar)
  if cap is not None:
    scores = soft_cap(scores, cap)
  scores = jnp.where(visible[:, None, None], scores, -1e30)
  weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
  mixed = product("bmgts,bmsh->btmgh", weights, values)
  return mixed.reshape(query.shape)


class Attention(nnx.Module):
  """Grouped-query attention; the caller says what the queries may see."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    width, size = (config.hidden_size,), config.head_size
    heads, kv_heads = (config.num_heads, size), (config.num_kv_heads, size)
    bias = config.qkv_bias
    kv_axes = ("embed", "kv_heads", "head_size")
    self.query = Linear(
      width, heads, ("embed", "heads", "head_size"), bias=bias, rngs=rngs
    )
    self.key = Linear(width, kv_heads, kv_axes, bias=bias, rngs=rngs)
    self.value = Linear(width, kv_heads, kv_axes, bias=bias, rngs=rngs)
    self.output = Linear(
      heads,
      width,
      ("heads", "head_size", "embed"),
      bias=config.output_bias,
      rngs=rngs,
    )
    if config.qk_norm:
      self.query_norm = RMSNorm(config, size, ("head_size",))
      self.key_norm = RMSNorm(config, size, ("head_size",))
    self.qk_norm = config.qk_norm
    self.scalar = config.query_scalar
    self.cap = config.attention_softcap

  def project(
    self,
    x: Float[Array, "B T D"],
    cosine: Float[Array, "B T 1 H2"],
    sine: Float[Array, "B T 1 H2"],
  ) -> tuple[Float[Array, "B T N H"], KeyValue]:
    """Rotated queries, and the rotated keys and values of the same tokens."""
    query, key = self.query(x), self.key(x)
    if self.qk_norm:
      query, key = self.query_norm(query), self.key_norm(key)
    query = rope.rotate(query, cosine, sine)
    key = rope.rotate(key, cosine, sine)
    return query, (key.swapaxes(1, 2), self.value(x).swapaxes(1, 2))

  def mix(
    self,
    query: Float[Array, "B T N H"],
    keys: Float[Array, "B M S H"],
    values: Float[Array, "B M S H"],
    visible: Bool[Array, "B T S"],
  ) -> Float[Array, "B T N H"]:
    """`attend` as this model does it."""
    return attend(query, keys, values, visible, self.scalar, self.cap)


ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
  "silu": jax.nn.silu,
  "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class MLP(nnx.Module):
  """down(activation(gate(x)) * up(x))."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    width, wide = (config.hidden_size,), (config.intermediate_size,)
    bias = config.mlp_bias
    self.gate = Linear(width, wide, ("embed", "ffw"), bias=bias, rngs=rngs)
    self.up = Linear(width, wide, ("embed", "ffw"), bias=bias, rngs=rngs)
    self.down = Linear(wide, width, ("ffw", "embed"), bias=bias, rngs=rngs)
    self.activation = config.activation

  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Each token by itself."""
    activate = ACTIVATIONS[self.activation]
    return self.down(activate(self.gate(x)) * self.up(x))
