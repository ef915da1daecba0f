"""Examples packed whole into rows of equal size, in an order that resumes.

An example is a prompt, its completion and an end-of-sequence id. All of them
are tokenised up front, so bad rows and lengths are known before any device
work; several processes do a share each. The endless order of the examples is
cut into windows; the examples of a window are put into rows by first fit, so
that a row of the run depends on the seed and its number alone. Arrays are
numpy's.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from opd_jax import processes, templates
from opd_jax.config import SftDataConfig, SourceConfig
from opd_jax.data import order, sources
from opd_jax.data.ragged import Ragged
from opd_jax.errors import InputError
from opd_jax.tokenizer import Tokenizer

# Examples that are packed at a time: many rows, so that little is left over.
_WINDOW = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
  """One example as ids.

  Attributes:
    ids: prompt, completion and end.
    prompt_length: of them that are the prompt and carry no loss.
  """

  ids: Int[np.ndarray, " n"]
  prompt_length: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackingReport:
  """What became of the rows of the sources; lengths in ids.

  Attributes:
    rows: in all sources.
    kept: used as examples.
    dropped: longer than a packed row, not used.
    empty: with an empty completion, not used.
    longest: the longest example of all.
    longest_kept: of those that are used.
    mean_length: of the examples that are used.
    used: fraction of the slots of packed rows that hold an id.
  """

  rows: int
  kept: int
  dropped: int
  empty: int
  longest: int
  longest_kept: int
  mean_length: float
  used: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedBatch:
  """The rows of one step; the fields of a `types.PackedRows`.

  Attributes:
    tokens: ids; 0 in empty slots.
    positions: from the first id of each example; -1 in empty slots.
    segments: number of the example in its row; -1 in empty slots.
    learned: ids of completions and their ends; never the first of an example,
      which nothing predicts.
    examples: of each row, indices of what lies in it.
  """

  tokens: Int[np.ndarray, "n S"]
  positions: Int[np.ndarray, "n S"]
  segments: Int[np.ndarray, "n S"]
  learned: Bool[np.ndarray, "n S"]
  examples: tuple[tuple[int, ...], ...]


class PackedExamples(Iterator[PackedBatch]):
  """Endless batches of packed rows.

  Every process makes the whole batch, and places of it what its devices hold.

  Attributes:
    report: what became of the rows of the sources.
  """

  def __init__(
    self,
    config: SftDataConfig,
    tokenizer: Tokenizer,
    *,
    seed: int,
    rows: int,
    row_tokens: int,
    vocab_size: int,
  ):
    """Reads and tokenises all sources.

    Args:
      config: the sources, and how their rows become examples.
      tokenizer: of the student.
      seed: of the order.
      rows: per step.
      row_tokens: S, slots of a row.
      vocab_size: ids that the model and the tokenizer have.

    Raises:
      InputError: bad file, no end-of-sequence id, an id the model does not
        have, or no example left.
    """
    self._shape = (rows, row_tokens)
    self._examples, counts, found = _prepare(
      config, tokenizer, row_tokens, vocab_size
    )
    self._digest = _digest(self._examples)
    bounds = [0, *itertools.accumulate(counts)]
    self._order: Any = order.endless(
      [range(*pair) for pair in itertools.pairwise(bounds)],
      [source.weight for source in config.sources.values()],
      seed=seed,
      shuffle=config.shuffle,
    )
    self._open(0)
    filled = sum(
      len(self._examples[index].ids) for row in self._rows for index in row
    )
    self.report = PackingReport(
      **found, used=filled / (len(self._rows) * row_tokens)
    )

  def example(self, index: int) -> Example:
    """The example with an index of `PackedBatch.examples`."""
    return self._examples[index]

  def __next__(self) -> PackedBatch:
    count, width = self._shape
    tokens = np.zeros((count, width), np.int32)
    positions = np.full((count, width), -1, np.int32)
    segments = np.full((count, width), -1, np.int32)
    learned = np.zeros((count, width), bool)
    picked = tuple(self._next_row() for _ in range(count))
    for row, examples in enumerate(picked):
      start = 0
      for segment, index in enumerate(examples):
        example = self._examples[index]
        length = len(example.ids)
        here = slice(start, start + length)
        tokens[row, here] = example.ids
        positions[row, here] = np.arange(length)
        segments[row, here] = segment
        learned[row, start + max(example.prompt_length, 1) : here.stop] = True
        start += length
    return PackedBatch(
      tokens=tokens,
      positions=positions,
      segments=segments,
      learned=learned,
      examples=picked,
    )

  def get_state(self) -> dict[str, Any]:
    """Where the iterator stands, as JSON."""
    return {
      "window": self._window,
      "row": self._row,
      "examples": self._digest,
    }

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Continues with the batch that was next when `get_state` was called.

    Raises:
      InputError: the examples are not those of the state.
    """
    if state["examples"] != self._digest:
      raise InputError(
        f"the examples changed since the state was saved (digest "
        f"{state['examples']}, now {self._digest}): resuming would not "
        "continue the same run; restore the data file, or use a new workdir"
      )
    self._open(state["window"])
    self._row = state["row"]

  def _next_row(self) -> tuple[int, ...]:
    if self._row == len(self._rows):
      self._open(self._window + 1)
    self._row += 1
    return self._rows[self._row - 1]

  def _open(self, window: int) -> None:
    """Packs the examples of a window, and stands before its first row."""
    size = min(_WINDOW, len(self._examples))
    indices = [
      int(self._order[place])
      for place in range(window * size, (window + 1) * size)
    ]
    lengths = [len(self._examples[index].ids) for index in indices]
    self._rows = [
      tuple(indices[place] for place in row)
      for row in first_fit(lengths, self._shape[1])
    ]
    self._window = window
    self._row = 0


def first_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
  """Puts each item, in order, into the first row that has room for it.

  Args:
    lengths: of the items, none above `size`.
    size: of a row.

  Returns:
    Indices of the items of each row.
  """
  room = np.full(len(lengths), size)
  rows: list[list[int]] = []
  for item, length in enumerate(lengths):
    row = int(np.argmax(room[: len(rows) + 1] >= length))
    if row == len(rows):
      rows.append([])
    rows[row].append(item)
    room[row] -= length
  return rows


def _prepare(
  config: SftDataConfig,
  tokenizer: Tokenizer,
  row_tokens: int,
  vocab_size: int,
) -> tuple[list[Example], list[int], dict[str, Any]]:
  """The examples to use, how many each source has, and the other counts."""
  if not tokenizer.stop_ids:
    raise InputError(
      f"the tokenizer in {tokenizer.path} has no end-of-sequence id, so that "
      "no completion could be taught to end; set eos_token in its "
      "tokenizer_config.json, or eos_token_id in generation_config.json"
    )
  kept: list[Example] = []
  counts: list[int] = []
  empty = dropped = longest = rows = 0
  for name, source in config.sources.items():
    shares = processes.exchange(
      functools.partial(_share, source, tokenizer, row_tokens, vocab_size)
    )
    examples = [one for share in shares for one in share.examples()]
    too_long = sum(share.dropped for share in shares)
    without = sum(share.empty for share in shares)
    longest = max(longest, *(share.longest for share in shares))
    if not examples:
      raise InputError(
        f"no row of data.sources.{name} can be used: {too_long} are "
        f"longer than batch.row_tokens = {row_tokens} (the longest has "
        f"{longest} ids) and {without} have an empty completion; "
        "raise batch.row_tokens, or look at the templates prompt and completion"
      )
    kept += examples
    counts.append(len(examples))
    dropped += too_long
    empty += without
    rows += sum(share.count for share in shares)
  return (
    kept,
    counts,
    {
      "rows": rows,
      "kept": len(kept),
      "dropped": dropped,
      "empty": empty,
      "longest": longest,
      "longest_kept": max(len(example.ids) for example in kept),
      "mean_length": sum(len(example.ids) for example in kept) / len(kept),
    },
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Share:
  """What a process made of its rows of a source, as it is sent."""

  ids: Ragged
  prompt_lengths: tuple[int, ...]
  count: int
  dropped: int
  empty: int
  longest: int

  def examples(self) -> Iterator[Example]:
    for ids, length in zip(self.ids.rows(), self.prompt_lengths, strict=True):
      yield Example(ids=ids, prompt_length=length)


def _share(
  source: SourceConfig, tokenizer: Tokenizer, row_tokens: int, vocab_size: int
) -> _Share:
  end = tokenizer.stop_ids[0]
  kept: list[np.ndarray] = []
  prompt_lengths: list[int] = []
  empty = dropped = longest = 0
  first, rows = sources.read_share(source)
  for index, row in enumerate(rows, start=first):
    where = sources.where(source, index)
    prompt = templates.prompt(source.prompt, row, tokenizer, where).ids
    text = templates.fill(source.completion, row, where)
    completion = tokenizer.encode(text, special_tokens=False)
    if completion[-1:] != [end]:
      completion.append(end)
    ids = [*prompt, *completion]
    sources.check_ids(ids, vocab_size, where)
    longest = max(longest, len(ids))
    # Else they would teach to end at once.
    if completion == [end]:
      empty += 1
    elif len(ids) > row_tokens:
      dropped += 1
    else:
      kept.append(np.asarray(ids, np.int32))
      prompt_lengths.append(len(prompt))
  return _Share(
    ids=Ragged.of(kept),
    prompt_lengths=tuple(prompt_lengths),
    count=len(rows),
    dropped=dropped,
    empty=empty,
    longest=longest,
  )


def _digest(examples: Sequence[Example]) -> str:
  digest = hashlib.sha256()
  for example in examples:
    sizes = [example.prompt_length, len(example.ids)]
    digest.update(np.array(sizes, "<i4").tobytes())
    digest.update(example.ids.astype("<i4").tobytes())
  return digest.hexdigest()[:16]
