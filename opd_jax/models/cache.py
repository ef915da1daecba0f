"""Keys and values of the tokens seen so far."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from opd_jax.sharding import Axes

CACHE_AXES: Axes = ("layers", "batch", "kv_heads", "sequence", "head_size")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
  """S slots per row; the position of a slot says who may see it.

  Attributes:
    keys: rotated keys, in the compute dtype.
    values: values, in the compute dtype.
    positions: of the token in each slot; -1 where there is none.
  """

  keys: Float[Array, "L B M S H"]
  values: Float[Array, "L B M S H"]
  positions: Int[Array, "B S"]

  def repeat(self, n: int) -> "KVCache":
    """Every row n times in a row: B becomes B * n."""
    return KVCache(
      keys=jnp.repeat(self.keys, n, axis=1),
      values=jnp.repeat(self.values, n, axis=1),
      positions=jnp.repeat(self.positions, n, axis=0),
    )
