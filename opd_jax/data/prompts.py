"""Rows of data to prompts, in an order that can be resumed.

Prompts are small: every host tokenises all of them up front, so bad rows,
counts and lengths are known before any device work, and makes the same batches.
Arrays are numpy's.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from opd_jax import templates
from opd_jax.config import DataConfig
from opd_jax.data import sources
from opd_jax.errors import InputError
from opd_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptReport:
  """What became of the rows of a file; lengths in ids.

  Attributes:
    rows: in the file.
    kept: used as prompts, the truncated ones included.
    truncated: longer than the window, first ids cut off.
    dropped: longer than the window, not used.
    empty: without a single id, not used.
    longest: the longest prompt before any cut to the window.
    mean_length: of the prompts as used.
  """

  rows: int
  kept: int
  truncated: int
  dropped: int
  empty: int
  longest: int
  mean_length: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
  """The prompts of one step.

  Attributes:
    tokens: left-aligned ids, then 0; the fields of a `types.PromptBatch`.
    lengths: ids per prompt, at least 1.
    rows: index of each prompt's row, counted over all sources in order.
  """

  tokens: Int[np.ndarray, "n P"]
  lengths: Int[np.ndarray, " n"]
  rows: tuple[int, ...]


class Prompts(Iterator[Batch]):
  """Endless batches of prompts; every epoch has each row once.

  Batches run across the end of an epoch, so no row is left out. Every process
  makes the whole batch, and places of it what its devices hold.

  Attributes:
    report: what became of the rows of the file.
  """

  def __init__(
    self,
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    seed: int,
    batch_size: int,
    vocab_size: int,
  ):
    """Reads and tokenises all sources.

    Args:
      config: the sources, and how their rows become prompts.
      tokenizer: of the student.
      seed: of the order.
      batch_size: prompts per step.
      vocab_size: ids that all models have.

    Raises:
      InputError: bad file, a prompt too long where `overlong` is "error", an
        id that a model does not have, or no prompt left.
    """
    self._ids, self.report = _prepare(config, tokenizer, vocab_size)
    self._rows = sorted(self._ids)
    self._window = config.max_prompt_tokens
    self._digest = _digest(self._ids)
    order = grain.MapDataset.source(range(len(self._rows)))
    if config.shuffle:
      order = order.seed(seed).shuffle()
    # Assembling a batch takes microseconds: no threads, nothing read ahead.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    self._batches = iter(
      order.repeat().batch(batch_size).to_iter_dataset(options)
    )

  def __next__(self) -> Batch:
    picked = next(self._batches)
    rows = tuple(self._rows[index] for index in picked)
    tokens = np.zeros((len(rows), self._window), np.int32)
    for slot, row in enumerate(rows):
      tokens[slot, : len(self._ids[row])] = self._ids[row]
    return Batch(
      tokens=tokens,
      lengths=np.array([len(self._ids[row]) for row in rows], np.int32),
      rows=rows,
    )

  def get_state(self) -> dict[str, Any]:
    """Where the iterator stands, as JSON."""
    return {"order": self._batches.get_state(), "prompts": self._digest}

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Continues with the batch that was next when `get_state` was called.

    Raises:
      InputError: the prompts are not those of the state.
    """
    if state["prompts"] != self._digest:
      raise InputError(
        f"the prompts changed since the state was saved (digest "
        f"{state['prompts']}, now {self._digest}): resuming would not continue "
        "the same run; restore the data file, or use a new workdir"
      )
    self._batches.set_state(state["order"])


def _prepare(
  config: DataConfig, tokenizer: Tokenizer, vocab_size: int
) -> tuple[dict[int, np.ndarray], PromptReport]:
  """Ids of the prompts to use by row, and the counts."""
  window = config.max_prompt_tokens
  kept: dict[int, np.ndarray] = {}
  count = empty = overlong = longest = 0
  for source in config.sources.values():
    for index, row in enumerate(sources.read(source)):
      where = sources.where(source, index)
      ids = templates.prompt(source.prompt, row, tokenizer, where).ids
      sources.check_ids(ids, vocab_size, where)
      count += 1
      longest = max(longest, len(ids))
      if len(ids) > window:
        if config.overlong == "error":
          raise InputError(
            f"{where}: the prompt has {len(ids)} tokens, "
            f"data.max_prompt_tokens is {window}; raise it, shorten the "
            'prompt, or set data.overlong to "truncate_left" or "drop"'
          )
        overlong += 1
        if config.overlong == "drop":
          continue
        ids = ids[-window:]
      if len(ids) == 0:
        empty += 1
        continue
      kept[count - 1] = np.asarray(ids, np.int32)
  if not kept:
    raise InputError(
      f"none of the {count} rows of data can be used: {overlong} "
      f"longer than data.max_prompt_tokens = {window} (the longest has "
      f"{longest}) and {empty} empty; raise data.max_prompt_tokens or set "
      'data.overlong to "truncate_left"'
    )
  dropped = overlong if config.overlong == "drop" else 0
  return kept, PromptReport(
    rows=count,
    kept=len(kept),
    truncated=overlong - dropped,
    dropped=dropped,
    empty=empty,
    longest=longest,
    mean_length=sum(map(len, kept.values())) / len(kept),
  )


def _digest(ids: Mapping[int, np.ndarray]) -> str:
  digest = hashlib.sha256()
  for row, prompt in ids.items():
    digest.update(np.array([row, len(prompt)], "<i4").tobytes())
    digest.update(prompt.astype("<i4").tobytes())
  return digest.hexdigest()[:16]
