"""The modules of a decoder.

A module holds the weights of one layer. Every parameter carries the logical
names of its dimensions as the metadata `axes`. Weights are cast to the compute
dtype where they are used; norms, rotations and softmax are float32 inside.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from opd_jax.models import rope
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


class RMSNorm(nnx.Module):
  """x / sqrt(mean(x^2) + eps) * scale, over the last dimension."""

  def __init__(self, size: int, eps: float, axes: Axes = ("norm",)):
    self.scale = nnx.Param(jnp.ones(size), axes=axes)
    self.eps = eps

  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Norms the last dimension; float32 inside."""
    wide = x.astype(jnp.float32)
    square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(square + self.eps)
    scale = _broadcast(self.scale[...], x)
    return (normed * scale.astype(jnp.float32)).astype(x.dtype)


class Linear(nnx.Module):
  """Contracts the last dimensions of x with the first of a kernel.

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
    dims = "abcd"[: len(inputs) + len(outputs)]
    contracted, free = dims[: len(inputs)], dims[len(inputs) :]
    self.equation = f"n{contracted},{dims}->n{free}"
    self.inputs = len(inputs)

  def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The product, in the dtype of x."""
    # As one matrix: the gradient of a product of [B, T, D] is laid out badly.
    lead = x.shape[: x.ndim - self.inputs]
    flat = x.reshape(-1, *x.shape[x.ndim - self.inputs :])
    y = product(self.equation, flat, self.kernel[...].astype(x.dtype))
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


def attend(
  query: Float[Array, "B T N H"],
  keys: Float[Array, "B M S H"],
  values: Float[Array, "B M S H"],
  visible: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
  """softmax(q k / sqrt(H)) v over the visible slots, in float32.

  Each of the M key/value heads serves N / M consecutive query heads. A query
  that sees nothing gets a mean of the values, not NaN.
  """
  batch, length, heads, size = query.shape
  kv_heads = keys.shape[1]
  grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, size)
  scores = product("btmgh,bmsh->bmgts", grouped, keys, dtype=jnp.float32)
  scores = scores / math.sqrt(size)
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
      self.query_norm = RMSNorm(size, config.norm_eps, ("head_size",))
      self.key_norm = RMSNorm(size, config.norm_eps, ("head_size",))
    self.qk_norm = config.qk_norm

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


class MLP(nnx.Module):
  """down(silu(gate(x)) * up(x))."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    width, wide = (config.hidden_size,), (config.intermediate_size,)
    bias = config.mlp_bias
    self.gate = Linear(width, wide, ("embed", "ffw"), bias=bias, rngs=rngs)
    self.up = Linear(width, wide, ("embed", "ffw"), bias=bias, rngs=rngs)
    self.down = Linear(wide, width, ("ffw", "embed"), bias=bias, rngs=rngs)

  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Each token by itself."""
    return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
  """Attention and MLP, each behind a norm and added to its input."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
    self.attention = Attention(config, rngs)
    self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
    self.mlp = MLP(config, rngs)

  def finish(
    self, x: Float[Array, "B T D"], mixed: Float[Array, "B T N H"]
  ) -> Float[Array, "B T D"]:
    """The rest of the block, after attention has mixed the values."""
    x = x + self.attention.output(mixed)
    return x + self.mlp(self.mlp_norm(x))
