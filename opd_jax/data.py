"""JSONL rows to prompts, in an order that can be resumed.

The only importer of grain. A file of prompts is small: every host tokenises
all of it up front, so bad rows, counts and lengths are known before any device
work, and makes the same batches. Arrays are numpy's.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from opd_jax.config import DataConfig
from opd_jax.errors import InputError


def read_jsonl(path: str | Path, field: str) -> list[dict[str, Any]]:
  """Rows of a JSONL file, each an object with a text in `field`.

  Blank lines at the end are ignored.

  Raises:
    InputError: no file, no rows, or a row (named by its 1-based line) that is
      not JSON, not an object, or has no text in `field`.
  """
  path = Path(path)
  if not path.is_file():
    raise InputError(
      f"no data file {path}; data.path and eval.path each name a JSONL file, "
      "one object a line"
    )
  lines = path.read_bytes().rstrip().split(b"\n")
  if lines == [b""]:
    raise InputError(f"data file {path} has no rows; write one object a line")
  rows = []
  for number, line in enumerate(lines, start=1):
    where = f"{path}, line {number}"
    try:
      row = json.loads(line)
    except ValueError as error:
      raise InputError(
        f"{where}: not valid JSON ({error}); every line must be one object"
      ) from error
    if not isinstance(row, dict):
      raise InputError(
        f"{where}: expected an object, got {type(row).__name__}; write "
        f'{{"{field}": ...}}'
      )
    if field not in row:
      raise InputError(
        f"{where}: no field {field!r}; the row has {', '.join(row) or 'none'}; "
        "name the one that holds the text in data.field (eval.field)"
      )
    if not isinstance(row[field], str):
      raise InputError(
        f"{where}: field {field!r} must be a string, got "
        f"{type(row[field]).__name__}"
      )
    try:
      row[field].encode()
    except UnicodeEncodeError as error:
      raise InputError(
        f"{where}: field {field!r} is not valid text ({error.reason} at "
        f"character {error.start}); correct the row"
      ) from error
    rows.append(row)
  return rows


def check_ids(ids: Sequence[int], vocab_size: int, where: str) -> None:
  """Raises InputError if a text has an id that a model has no row for."""
  largest = max(ids, default=0)
  if largest >= vocab_size:
    raise InputError(
      f"{where}: the tokenizer gives id {largest}, but the models have "
      f"ids 0 to {vocab_size - 1}; use the tokenizer that belongs to them, or "
      "texts without its added tokens"
    )


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
    rows: 0-based row of the file.
    texts: the row's text, before newlines were replaced and prompts cut.
  """

  tokens: Int[np.ndarray, "n P"]
  lengths: Int[np.ndarray, " n"]
  rows: tuple[int, ...]
  texts: tuple[str, ...]


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
    encode: Callable[[str], Sequence[int]],
    *,
    seed: int,
    batch_size: int,
    vocab_size: int,
  ):
    """Reads and tokenises the whole file.

    Args:
      config: the file, and how its rows become prompts.
      encode: text to ids.
      seed: of the order.
      batch_size: prompts per step.
      vocab_size: ids that all models have.

    Raises:
      InputError: bad file, a prompt too long where `overlong` is "error", an
        id that a model does not have, or no prompt left.
    """
    self._texts = [
      row[config.field] for row in read_jsonl(config.path, config.field)
    ]
    self._ids, self.report = _prepare(config, self._texts, encode, vocab_size)
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
      texts=tuple(self._texts[row] for row in rows),
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
  config: DataConfig,
  texts: Sequence[str],
  encode: Callable[[str], Sequence[int]],
  vocab_size: int,
) -> tuple[dict[int, np.ndarray], PromptReport]:
  """Ids of the prompts to use by row, and the counts."""
  window = config.max_prompt_tokens
  kept: dict[int, np.ndarray] = {}
  empty = overlong = longest = 0
  for row, text in enumerate(texts):
    if config.replace_newlines is not None:
      text = text.replace("\n", config.replace_newlines)
    ids = np.asarray(encode(text)[: config.prompt_tokens], np.int32)
    check_ids(ids.tolist(), vocab_size, f"{config.path}, line {row + 1}")
    longest = max(longest, len(ids))
    if len(ids) > window:
      if config.overlong == "error":
        raise InputError(
          f"{config.path}, line {row + 1}: the prompt has {len(ids)} tokens, "
          f"data.max_prompt_tokens is {window}; raise it, shorten the prompt, "
          'or set data.overlong to "truncate_left" or "drop"'
        )
      overlong += 1
      if config.overlong == "drop":
        continue
      ids = ids[-window:]
    if len(ids) == 0:
      empty += 1
      continue
    kept[row] = ids
  if not kept:
    raise InputError(
      f"{config.path}: none of the {len(texts)} rows can be used: {overlong} "
      f"longer than data.max_prompt_tokens = {window} (the longest has "
      f"{longest}) and {empty} empty; raise data.max_prompt_tokens or set "
      'data.overlong to "truncate_left"'
    )
  dropped = overlong if config.overlong == "drop" else 0
  return kept, PromptReport(
    rows=len(texts),
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
