"""One layer of a decoder, of whatever family."""

from flax import nnx
from jaxtyping import Array, Float, Int

from opd_jax.models import experts, layers
from opd_jax.models.config import ModelConfig
from opd_jax.sharding import Layout


class Block(nnx.Module):
  """Attention and MLP or experts, each behind a norm and added to its input.

  With `post_norms` what they return is normed as well.
  """

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    self.attention_norm = layers.RMSNorm(config, config.hidden_size)
    self.attention = layers.Attention(config, rngs)
    self.mlp_norm = layers.RMSNorm(config, config.hidden_size)
    self.mlp = (
      layers.MLP(config, rngs)
      if config.experts is None
      else experts.Experts(config, config.experts, rngs)
    )
    if config.post_norms:
      self.attention_post_norm = layers.RMSNorm(config, config.hidden_size)
      self.mlp_post_norm = layers.RMSNorm(config, config.hidden_size)
    self.post_norms = config.post_norms

  def finish(
    self,
    x: Float[Array, "B T D"],
    mixed: Float[Array, "B T N H"],
    layout: Layout,
    layer: Int[Array, ""] | None = None,
  ) -> Float[Array, "B T D"]:
    """The rest of the block, after attention has mixed the values.

    Args:
      x: what the block was given.
      mixed: the values as the queries mixed them.
      layout: says which device runs which expert.
      layer: see `experts.Experts`.
    """
    attended = self.attention.output(mixed)
    if self.post_norms:
      attended = self.attention_post_norm(attended)
    x = x + attended
    out = self.mlp_norm(x)
    if isinstance(self.mlp, experts.Experts):
      out = self.mlp(out, layout, layer)
    else:
      out = self.mlp(out)
    if self.post_norms:
      out = self.mlp_post_norm(out)
    return x + out
