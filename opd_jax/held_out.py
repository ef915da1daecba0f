"""The held-out loss: how well a model predicts texts it was not trained on."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from opd_jax import templates
from opd_jax.config import HeldOutConfig
from opd_jax.data import sources
from opd_jax.errors import InputError
from opd_jax.models import Model
from opd_jax.objectives.base import Needs, Request
from opd_jax.scoring import Scorer
from opd_jax.sharding import Layout
from opd_jax.types import Params, PromptBatch, ScoringBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
  """Texts as ids, cut into equal batches; rows of padding have length 0.

  Attributes:
    tokens: left-aligned, in [batches, batch, length].
    lengths: ids per text.
  """

  tokens: Int[np.ndarray, "N B S"]
  lengths: Int[np.ndarray, "N B"]

  def place(self, layout: Layout) -> tuple[Array, Array]:
    """The texts on the devices, each batch spread over the batch axes.

    Rows of padding fill a batch up to what the mesh divides.
    """
    missing = -self.lengths.shape[1] % layout.shards("batch")

    def put(array: np.ndarray) -> Array:
      behind = [(0, 0)] * (array.ndim - 2)
      array = np.pad(array, [(0, 0), (0, missing), *behind])
      axes = (None, "batch") + (None,) * (array.ndim - 2)
      return layout.place(array, axes)

    return put(self.tokens), put(self.lengths)


def read(
  config: HeldOutConfig, encode: Callable[[str], Sequence[int]], vocab_size: int
) -> HeldOut:
  """Reads and encodes the texts of a JSONL file.

  Args:
    config: the file, and how its texts are cut.
    encode: text to ids.
    vocab_size: ids of the model.

  Raises:
    InputError: bad file, an id the model does not have, or no text with two
      ids or more.
  """
  if config.path is None:
    raise ValueError("held_out.path is None: there is nothing to read")
  rows = sources.read_jsonl(config.path)[: config.rows]
  texts = []
  for number, row in enumerate(rows, start=1):
    where = f"{config.path}, line {number}"
    text = templates.fill(config.text, row, where)[: config.max_characters]
    if config.replace_newlines is not None:
      text = text.replace("\n", config.replace_newlines)
    texts.append(list(encode(text))[: config.max_tokens])
    sources.check_ids(texts[-1], vocab_size, where)
  if max(map(len, texts)) < 2:
    raise InputError(
      f"{config.path}: no text has two ids or more, so there is no token to "
      "predict; give longer texts"
    )
  count = -(-len(texts) // config.batch)
  width = max(map(len, texts))
  tokens = np.zeros((count * config.batch, width), np.int32)
  lengths = np.zeros(count * config.batch, np.int32)
  for index, ids in enumerate(texts):
    tokens[index, : len(ids)] = ids
    lengths[index] = len(ids)
  return HeldOut(
    tokens=tokens.reshape(count, config.batch, width),
    lengths=lengths.reshape(count, config.batch),
  )


class HeldOutLoss:
  """The held-out loss as a measurement of a run; see `task.Measurement`.

  Attributes:
    every: steps between two.
  """

  def __init__(self, texts: HeldOut, model: Model, every: int):
    """Places and compiles nothing before the first call."""
    self.every = every
    self._place = functools.cache(lambda: texts.place(model.layout))
    self._loss = jax.jit(
      lambda params, tokens, lengths: loss(model, params, tokens, lengths),
      out_shardings=model.layout.replicated(),
    )

  def __call__(self, params: Params) -> dict[str, float]:
    """Nats per token by the name of the metric."""
    return {"held_out/loss": float(self._loss(params, *self._place()))}

  def examples(self, count: int) -> list[Mapping[str, Any]]:
    """There is no text in it."""
    return []


def loss(
  model: Model,
  params: Params,
  tokens: Int[Array, "N B S"],
  lengths: Int[Array, "N B"],
) -> Float[Array, ""]:
  """Mean over all tokens but each text's first of -log p(token), in nats.

  Pure, for use inside jit. The softmax runs over all rows of the model's own
  vocabulary, at temperature 1.
  """
  scorer = Scorer(student=model, vocab_size=model.config.vocab_size)
  needs = Needs(student=Request(logprobs=True))

  def batch_sum(part: tuple[Array, Array]) -> tuple[Array, Array]:
    tokens, lengths = part
    completion = tokens[:, 1:]
    after = jnp.maximum(lengths - 1, 0)
    mask = jnp.arange(completion.shape[1])[None, :] < after[:, None]
    batch = ScoringBatch(
      prompts=PromptBatch(tokens=tokens[:, :1], lengths=jnp.ones_like(lengths)),
      tokens=completion,
      lengths=after,
      sampled_mask=jnp.zeros_like(mask),
      loss_mask=mask,
      behavior_valid=jnp.zeros_like(mask),
      behavior_logprobs=jnp.zeros(mask.shape, jnp.float32),
      group=jnp.zeros_like(lengths),
    )
    hidden = {"student": scorer.hidden("student", params, batch)}
    head = {"student": model.split_head(params)[1]}
    fields = scorer.fields(needs, hidden, head, batch).fields
    return -jnp.sum(fields["student"].logprobs), jnp.sum(mask)

  sums, counts = jax.lax.map(batch_sum, (tokens, lengths))
  return jnp.sum(sums) / jnp.sum(counts)
