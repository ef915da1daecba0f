"""Kernels as int8 with a float32 scale per output channel (weight-only).

    w[i, o] ~ q[i, o] s[o],  s[o] = max_i |w[i, o]| / 127,  q = round(w / s)

so that |w - q s| <= s / 2. A product is x w ~ (x q) s: the kernel is read as
int8, cast where it is multiplied, and what comes out is scaled. Activations
keep the compute dtype. A kernel of experts has scales for each of them.

Kernels of the layers are held so. Embeddings and the output layer are not: an
error in them goes into the logits directly, and they are a few percent of a
large model. Nor are routers, whose choice is a threshold, norms and biases.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int8

KERNEL = "kernel"
SCALE = "kernel_scale"
_LARGEST = 127


def quantize(
  kernel: Float[Array, "..."], inputs: tuple[int, ...]
) -> tuple[Int8[Array, "..."], Float[Array, "..."]]:
  """A kernel as int8, and its scales.

  Args:
    kernel: with any dtype; computed in float32.
    inputs: its contracted dimensions, which the scales do not have. A channel
      of zeros has scale 0.
  """
  wide = kernel.astype(jnp.float32)
  scale = jnp.max(jnp.abs(wide), axis=inputs, keepdims=True) / _LARGEST
  steps = jnp.round(wide / jnp.where(scale > 0, scale, 1.0))
  return steps.astype(jnp.int8), jnp.squeeze(scale, axis=inputs)


def rescale(
  y: Float[Array, "..."], scale: Float[Array, "..."]
) -> Float[Array, "..."]:
  """What a product with an int8 kernel becomes: y s, rounded once.

  Args:
    y: [..., *outputs].
    scale: [*outputs].
  """
  scale = jnp.expand_dims(scale, range(y.ndim - scale.ndim))
  return (y.astype(jnp.float32) * scale).astype(y.dtype)


def hold(module: nnx.Module, inputs: tuple[int, ...]) -> None:
  """Makes a module with a kernel hold it as int8.

  Args:
    module: with a parameter `kernel`.
    inputs: the kernel's contracted dimensions.
  """
  kernel = getattr(module, KERNEL)
  axes = kernel.get_metadata()["axes"]
  values, scale = quantize(kernel[...], inputs)
  outputs = tuple(name for dim, name in enumerate(axes) if dim not in inputs)
  setattr(module, KERNEL, nnx.Param(values, axes=axes))
  setattr(module, SCALE, nnx.Param(scale, axes=outputs))


def decides_dtype(path: Any, leaf: Any) -> bool:
  """Whether a weight's dtype is that of the format, whatever others have."""
  return path[-1].key == SCALE or leaf.dtype == jnp.int8
