"""A language model as pure functions of its weights."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from opd_jax.models import attention, experts, layers, rope, transformer
from opd_jax.models.cache import CACHE_AXES, KVCache, attend
from opd_jax.models.places import Blocks
from opd_jax.models.weights import WeightSpec
from opd_jax.sharding import Axes
from opd_jax.types import MASKED_LOGPROB, Params

_HEAD = "lm_head"

_REMAT_POLICIES = {
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "full": jax.checkpoint_policies.nothing_saveable,
}


class _View(NamedTuple):
  """What a layer knows of places: who sees whom, and the rotations.

  `visible` is None where attention runs in blocks, which find it themselves.
  """

  visible: Bool[Array, "B T S"] | None
  cosine: Float[Array, "B T 1 H2"]
  sine: Float[Array, "B T 1 H2"]


@dataclasses.dataclass(frozen=True)
class Model(WeightSpec):
  """Everything about a model but its weights; hashable, so it may be static.

  A token in slot s of a row attends to a slot of the same row iff that slot's
  position is >= 0 and <= its own; in a local layer also only if the positions
  are less than the window apart. Position -1 marks an empty slot: nothing
  sees it, and what comes out of it is finite and means nothing. In a row of
  several segments a token sees the slots of its own segment only.

  Attributes:
    remat: what the backward pass recomputes of each block: "none" nothing,
      "full" all of it, "dots" all but the products with weights.
  """

  _: dataclasses.KW_ONLY
  remat: str = "none"

  def split_head(self, params: Params) -> tuple[Params, Params]:
    """What `hidden` reads, and what `logits` reads.

    With tied embeddings the embedding is in both.
    """
    head = "embed" if self.config.tie_embeddings else _HEAD
    trunk = {name: part for name, part in params.items() if name != _HEAD}
    return trunk, {head: params[head]}

  def hidden(
    self,
    params: Params,
    tokens: Int[Array, "B S"],
    positions: Int[Array, "B S"],
    segments: Int[Array, "B S"] | None = None,
  ) -> Float[Array, "B S D"]:
    """Hidden states behind the final norm, in the compute dtype.

    Args:
      params: weights.
      tokens: ids.
      positions: of the ids; -1 in empty slots.
      segments: which of several texts in its row a slot belongs to; None for
        one text a row.
    """
    x, _ = self._forward(params, tokens, positions, segments)
    return self._rows(self._part(params, "final_norm")(x))

  def logits(
    self, params: Params, hidden: Float[Array, "... D"]
  ) -> Float[Array, "... V"]:
    """Next-token logits, float32, over the padded vocabulary.

    Columns that are no id of the model hold `MASKED_LOGPROB` and carry no
    gradient.
    """
    name = "embed" if self.config.tie_embeddings else _HEAD
    scores = layers.product(
      "...d,vd->...v",
      hidden.astype(self.compute_dtype),
      self._table(params, name),
      dtype=jnp.float32,
    )
    if self.config.logit_softcap is not None:
      scores = layers.soft_cap(scores, self.config.logit_softcap)
    column = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    real = column < self.config.vocab_size
    return self._rows(jnp.where(real, scores, MASKED_LOGPROB), "vocab")

  def init_cache(self, batch: int, slots: int) -> KVCache:
    """An empty cache; of more slots where the mesh would not divide them."""
    config = self.config
    slots += -slots % self.layout.shards("sequence")
    shape = (
      config.num_layers,
      batch,
      config.num_kv_heads,
      slots,
      config.head_size,
    )
    return self._place_cache(
      KVCache(
        keys=jnp.zeros(shape, self.compute_dtype),
        values=jnp.zeros(shape, self.compute_dtype),
        positions=jnp.full((batch, slots), -1, jnp.int32),
      )
    )

  def prefill(
    self,
    params: Params,
    tokens: Int[Array, "B P"],
    positions: Int[Array, "B P"],
    slots: int,
  ) -> tuple[Float[Array, "B D"], KVCache]:
    """Runs right-aligned prompts and keeps their keys and values.

    Args:
      params: weights.
      tokens: `sequences.right_align`ed ids, so that slot P - 1 holds the last
        id of every prompt.
      positions: of the ids; -1 in the empty slots before them.
      slots: S >= P, of the cache; it has more where the mesh would not divide
        them, which stay empty.

    Returns:
      The hidden state of slot P - 1 behind the final norm, and the cache with
      its first P slots written.
    """
    x, (keys, values) = self._forward(
      params, tokens, positions, keep_cache=True
    )
    free = slots - tokens.shape[1] + -slots % self.layout.shards("sequence")
    padding = ((0, 0), (0, 0), (0, 0), (0, free), (0, 0))
    cache = KVCache(
      keys=jnp.pad(keys, padding),
      values=jnp.pad(values, padding),
      positions=jnp.pad(positions, ((0, 0), (0, free)), constant_values=-1),
    )
    last = self._part(params, "final_norm")(x[:, -1])
    return self._rows(last), self._place_cache(cache)

  def decode(
    self,
    params: Params,
    cache: KVCache,
    tokens: Int[Array, " B"],
    positions: Int[Array, " B"],
    slot: Int[Array, ""] | int,
  ) -> tuple[Float[Array, "B D"], KVCache]:
    """Runs one token per row, seeing the cache and itself.

    Args:
      params: weights.
      cache: what came before.
      tokens: ids.
      positions: of the ids; -1 for a row whose token nothing may see.
      slot: where all rows write their keys and values.

    Returns:
      Hidden states behind the final norm, and the cache with the slot written.
    """
    seen = jax.lax.dynamic_update_slice(
      cache.positions, positions[:, None].astype(jnp.int32), (0, slot)
    )
    view_of = self._views(positions[:, None], seen)
    x = self._embed(params, tokens[:, None])

    # Not cut into layers by the scan: that would copy the experts of a layer,
    # also those that no token chose.
    by_layer, kernels = experts.apart(params[transformer.STACKED])

    def step(carry, scanned):
      x, keys, values = carry
      weights, layer, local = scanned
      weights = experts.together(weights, kernels)
      block = self._part({transformer.STACKED: weights}, transformer.STACKED)
      view = view_of(local)
      query, (key, value) = block.attention.project(
        block.attention_norm(x), view.cosine, view.sine
      )
      # Pinned here as well: a compiler that moves the cache inside the loop
      # over layers has to move all of it back for every token.
      start = (layer, 0, 0, slot, 0)
      keys, values = (
        self._place(
          jax.lax.dynamic_update_slice(old, new[None], start), CACHE_AXES
        )
        for old, new in ((keys, key), (values, value))
      )
      mixed = attend(
        query,
        KVCache(keys=keys, values=values, positions=seen),
        cast(Array, view.visible),
        layer=layer,
        slot=slot,
        layout=self.layout,
        scalar=block.attention.scalar,
        cap=block.attention.cap,
      )
      x = block.finish(x, mixed, self.layout, layer if kernels else None)
      return (self._rows(x), keys, values), None

    scanned = (
      by_layer,
      jnp.arange(self.config.num_layers),
      jnp.asarray(self.config.is_local),
    )
    (x, keys, values), _ = jax.lax.scan(
      step, (x, cache.keys, cache.values), scanned
    )
    x = self._part(params, "final_norm")(x[:, 0])
    cache = KVCache(keys=keys, values=values, positions=seen)
    return self._rows(x), self._place_cache(cache)

  def _forward(
    self,
    params: Params,
    tokens: Int[Array, "B S"],
    positions: Int[Array, "B S"],
    segments: Int[Array, "B S"] | None = None,
    keep_cache: bool = False,
  ) -> tuple[Float[Array, "B S D"], Any]:
    """Hidden states before the final norm, and all layers' keys and values."""
    blocks = Blocks.of(tokens.shape[1], self.layout)
    if blocks is None:
      same = None
      if segments is not None:
        same = segments[:, :, None] == segments[:, None, :]
      view_of = self._views(positions, positions, same)
    else:
      tokens, positions = blocks.deal(tokens, 0), blocks.deal(positions, -1)
      if segments is not None:
        segments = blocks.deal(segments, -1)
      view_of = self._views(blocks.split(positions), None)
      # Gathered here, once: queries of a shard look at the keys of all.
      positions, segments = jax.tree.map(
        lambda x: self._place(x, ("batch", None)), (positions, segments)
      )
    layout = self.layout.in_shard("sequence")
    alone = dataclasses.replace(self, layout=layout)

    def step(x, scanned):
      weights, local = scanned
      block = self._part({transformer.STACKED: weights}, transformer.STACKED)
      view = view_of(local)

      def project(x, cosine, sine):
        return block.attention.project(block.attention_norm(x), cosine, sine)

      def finish(x, mixed):
        return alone._rows(block.finish(x, mixed, alone.layout))

      if blocks is None:
        query, (keys, values) = project(x, view.cosine, view.sine)
        mixed = block.attention.mix(query, keys, values, view.visible)
        x = finish(x, mixed)
      else:
        project = blocks.by_shard(project, self.layout)
        query, (keys, values) = project(x, view.cosine, view.sine)
        keys, values = blocks.merge(keys, 2), blocks.merge(values, 2)
        mix = attention.BlockAttention(
          blocks=blocks,
          layout=self.layout.computing(),
          window=self.config.window,
          kinds=frozenset(self.config.local_layers),
          scalar=block.attention.scalar,
          cap=block.attention.cap,
        )
        places = attention.Places(positions, segments, local)
        mixed = mix(blocks.merge(query), keys, values, places)
        x = blocks.by_shard(finish, self.layout)(x, blocks.split(mixed))
      return x, (keys, values) if keep_cache else None

    if self.remat != "none":
      policy = _REMAT_POLICIES[self.remat]
      step = jax.checkpoint(step, policy=policy, prevent_cse=False)
    x = self._embed(params, tokens)
    if blocks is not None:
      x = blocks.split(x)
    local = jnp.asarray(self.config.is_local)
    x, kept = jax.lax.scan(step, x, (params[transformer.STACKED], local))
    if blocks is None:
      return x, kept
    layout = self.layout.computing()
    x = blocks.collect(blocks.merge(x), ("batch", "sequence", None), layout)
    return x, jax.tree.map(
      lambda leaf: blocks.collect(leaf, CACHE_AXES, layout), kept
    )

  def _views(
    self,
    queries: Int[Array, "B T"],
    keys: Int[Array, "B S"] | None,
    same: Bool[Array, "B T S"] | None = None,
  ) -> Callable[[Bool[Array, ""]], _View]:
    """Views by kind of layer; both kinds are made once, for all layers.

    Args:
      queries: positions.
      keys: positions; None where nobody asks who sees whom.
      same: whether query and key are of the same text; None if all are.

    Returns:
      A function of whether the layer is local.
    """
    config = self.config

    def view(local: bool) -> _View:
      visible = None
      if keys is not None:
        window = config.window if local else None
        visible = layers.visible(queries, keys, window)
        if same is not None:
          visible &= same
      turns = config.local_rope if local else None
      turn = rope.angles(turns or config.rope, config.head_size, queries)
      return _View(visible, *turn)

    views = {local: view(local) for local in set(config.local_layers)}
    if len(views) == 1:
      (only,) = views.values()
      return lambda local: only
    return lambda local: jax.tree.map(
      functools.partial(jnp.where, local), views[True], views[False]
    )

  def _embed(
    self, params: Params, tokens: Int[Array, "B S"]
  ) -> Float[Array, "B S D"]:
    x = jnp.take(self._table(params, "embed"), tokens, axis=0)
    if self.config.scale_embeddings:
      # The factor is rounded to the compute dtype, as in the original models.
      x = x * jnp.asarray(math.sqrt(self.config.hidden_size), x.dtype)
    return self._rows(x)

  def _table(self, params: Params, name: str) -> Float[Array, "V D"]:
    """An embedding, spread over the vocabulary alone.

    Rows of tokens cannot be looked up in, nor multiplied with, vectors that
    are cut along D over the same mesh axis.
    """
    table = self._part(params, name).table(self.compute_dtype)
    return self.layout.constrain(table, ("vocab", None))

  def _part(self, params: Params, name: str) -> Any:
    weights = params[name]
    if self.offload and name == transformer.STACKED:
      weights = jax.device_put(weights, jax.memory.Space.Device)
    lora = self._lora_of(weights)
    return transformer.part(self.config, weights, name, lora, self._int8)

  def _rows(self, x: jax.Array, last: str | None = None) -> jax.Array:
    """Places an array by its rows, and by its last dimension's name."""
    axes = ("batch", "sequence", *(None,) * x.ndim)[: x.ndim - 1]
    return self._place(x, (*axes, last))

  def _place_cache(self, cache: KVCache) -> KVCache:
    return KVCache(
      keys=self._place(cache.keys, CACHE_AXES),
      values=self._place(cache.values, CACHE_AXES),
      positions=self._place(cache.positions, ("batch", None)),
    )

  def _place(self, x: jax.Array, axes: Axes) -> jax.Array:
    """Pins an array to its place; what is too small is replicated."""
    return self.layout.constrain(x, self.layout.fitting(axes, x.shape))
