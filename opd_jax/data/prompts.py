"""Rows of data to prompts, in an order that can be resumed.

Prompts are small: all of them are tokenised up front, so bad rows, counts and
lengths are known before any device work. Several processes read and tokenise a
share each and exchange the ids; then all make the same batches. Arrays are
numpy's.
"""

import bisect
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from opd_jax import processes, templates
from opd_jax.config import DataConfig
from opd_jax.data import order, preparing, sources, store
from opd_jax.data.files import Row
from opd_jax.data.preparing import Example, Ids, PromptReport, Share
from opd_jax.errors import InputError
from opd_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
  """Prompts as arrays; the fields of a `types.PromptBatch`.

  Attributes:
    tokens: left-aligned ids, then 0.
    lengths: ids per prompt, at least 1.
  """

  tokens: Int[np.ndarray, "n P"]
  lengths: Int[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch(Tokens):
  """The prompts of one step.

  Attributes:
    rows: index of each prompt's row, counted over all sources in order.
    sources: index of each prompt's source, in the order of `data.sources`; None
      if there is one only.
    teacher: what the teacher reads instead; None if it reads the same ids.
    given: stored completions, of length 0 for a row without one; None if no
      source is `given`.
    answers: of the rows; empty where nobody asks for them.
  """

  rows: tuple[int, ...]
  sources: Int[np.ndarray, " n"] | None = None
  teacher: Tokens | None = None
  given: Tokens | None = None
  answers: tuple[str, ...] = ()


class Prompts(Iterator[Batch]):
  """Endless batches of prompts; every epoch of a source has each row once.

  Several sources are mixed in proportion to their weights, each beginning its
  next epoch when its rows are used up. Batches run across the end of an epoch,
  so no row is left out. Every process makes the whole batch, and places of it
  what its devices hold.

  Attributes:
    report: what became of all rows.
    reports: what became of those of each source, by its name.
    teacher_window: slots of the teacher's prompts, as many as the longest has
      ids; None if no source has a `teacher_prompt`.
    given_window: slots of given completions; None if no source is `given`.
  """

  def __init__(
    self,
    config: DataConfig,
    tokenizer: Tokenizer,
    teacher: Tokenizer | None = None,
    *,
    seed: int,
    batch_size: int,
    vocab_size: int,
    teacher_vocab_size: int | None = None,
    completion_tokens: int = 0,
    stop_ids: Sequence[int] = (),
    domain_teachers: Mapping[str, tuple[Tokenizer, int]] | None = None,
    with_answers: bool = False,
  ):
    """Reads and tokenises all sources.

    Args:
      config: the sources, and how their rows become prompts.
      tokenizer: of the student.
      teacher: of the teacher, for sources with a `teacher_prompt`.
      seed: of the order.
      batch_size: prompts per step.
      vocab_size: ids that all models have.
      teacher_vocab_size: ids that the teacher has; None for `vocab_size`.
      completion_tokens: T, slots of a given completion.
      stop_ids: that end one.
      domain_teachers: tokenizer and ids of the teachers of some sources.
      with_answers: batches hold the answers of their rows.

    Raises:
      InputError: bad source, a row without its answer, a prompt too long where
        `overlong` is "error" or a completion is given for it, an id that a
        model does not have, a given completion that does not belong to its
        prompt, or no prompt left.
    """
    self._config = config
    self._tokenizer = tokenizer
    self._stop_ids = tuple(stop_ids)
    if teacher_vocab_size is None:
      teacher_vocab_size = vocab_size
    default = (teacher, teacher_vocab_size)
    self._teachers = dict.fromkeys(config.sources, default)
    self._teachers |= domain_teachers or {}
    self._window = config.max_prompt_tokens
    self._rows: dict[int, Ids] = {}
    self.reports: dict[str, PromptReport] = {}
    rows_of = {}
    first = 0
    self._firsts: list[int] = []
    for name in config.sources:
      shares = processes.exchange(
        functools.partial(
          self._share,
          name,
          vocab_size,
          completion_tokens,
          config.sources[name].answer if with_answers else None,
        )
      )
      kept = {
        first + index: ids for share in shares for index, ids in share.rows()
      }
      self.reports[name] = preparing.total([share.report for share in shares])
      self._firsts.append(first)
      rows_of[name] = list(kept)
      self._rows |= kept
      first += self.reports[name].rows
    self.report = preparing.total(list(self.reports.values()))
    _check_kept(config, self.reports)
    self.teacher_window = None
    if any(source.teacher_prompt for source in config.sources.values()):
      self.teacher_window = max(len(i.teacher) for i in self._rows.values())
    self.given_window = None
    if any(source.given for source in config.sources.values()):
      self.given_window = completion_tokens
    self._digest = _digest(self._rows)
    rows = order.endless(
      list(rows_of.values()),
      [source.weight for source in config.sources.values()],
      seed=seed,
      shuffle=config.shuffle,
    )
    # Assembling a batch takes microseconds: no threads, nothing read ahead.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    self._batches = iter(rows.batch(batch_size).to_iter_dataset(options))

  def __next__(self) -> Batch:
    rows = tuple(int(row) for row in next(self._batches))
    ids = [self._rows[row] for row in rows]
    student = _pad([one.student for one in ids], self._window)
    teacher = given = None
    if self.teacher_window is not None:
      teacher = _pad([one.teacher for one in ids], self.teacher_window)
    if self.given_window is not None:
      given = _pad([one.given for one in ids], self.given_window)
    numbers = None
    if len(self._config.sources) > 1:
      numbers = np.array([self._source_of(row) for row in rows], np.int32)
    return Batch(
      tokens=student.tokens,
      lengths=student.lengths,
      rows=rows,
      sources=numbers,
      teacher=teacher,
      given=given,
      answers=tuple(one.answer for one in ids if one.answer is not None),
    )

  def where(self, row: int) -> str:
    """A row, by its index over all sources, in words."""
    number = self._source_of(row)
    source = list(self._config.sources.values())[number]
    return sources.where(source, row - self._firsts[number])

  def answers(self) -> Iterator[tuple[int, str]]:
    """Index over all sources and answer of every row that is used."""
    for row, one in self._rows.items():
      if one.answer is not None:
        yield row, one.answer

  def examples(self, count: int | None = None) -> list[Example]:
    """The first rows of every source and their prompts; None for all rows.

    They are read again: nothing but the ids of all rows is kept.
    """
    found = []
    for name, source in self._config.sources.items():
      rows = enumerate(sources.read(source)[:count])
      found += [self._example(name, index, row) for index, row in rows]
    return found

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
        "the same run; restore the data, or use a new workdir"
      )
    self._batches.set_state(state["order"])

  def _source_of(self, row: int) -> int:
    return bisect.bisect_right(self._firsts, row) - 1

  def _share(
    self,
    name: str,
    vocab_size: int,
    completion_tokens: int,
    answer: str | None,
  ) -> Share:
    """What this process makes of its rows of a source."""
    first, rows = sources.read_share(self._config.sources[name])
    kept, report = preparing.prepare(
      self._config,
      (
        self._example(name, index, row)
        for index, row in enumerate(rows, start=first)
      ),
      vocab_size,
      self._teachers[name][1],
      completion_tokens,
      answer,
    )
    return Share.of(kept, report)

  def _example(self, name: str, index: int, row: Row) -> Example:
    source = self._config.sources[name]
    teacher_tokenizer, _ = self._teachers[name]
    where = sources.where(source, index)
    teacher = None
    if source.teacher_prompt is not None:
      if teacher_tokenizer is None:
        raise ValueError(f"source {name} needs the teacher's tokenizer")
      teacher = templates.prompt(
        source.teacher_prompt, row, teacher_tokenizer, where
      )
    student = templates.prompt(source.prompt, row, self._tokenizer, where)
    given = None
    if source.given:
      given = store.given_ids(row, student.ids, self._stop_ids, where)
    return Example(
      source=name,
      index=index,
      where=where,
      row=row,
      student=student,
      teacher=teacher,
      given=given,
    )


def _check_kept(
  config: DataConfig, reports: Mapping[str, PromptReport]
) -> None:
  """Raises unless every source has a row to draw."""
  for name, report in reports.items():
    if not report.kept:
      raise InputError(
        f"none of the {report.rows} rows of source {name!r} "
        f"({config.sources[name].path}) can be used: {report.dropped} with "
        f"prompts longer than data.max_prompt_tokens = "
        f"{config.max_prompt_tokens} (the student's longest has "
        f"{report.longest}) and {report.empty} empty; raise "
        'data.max_prompt_tokens, set data.overlong to "truncate_left", or '
        "leave the source out"
      )


def _pad(prompts: Sequence[np.ndarray], window: int) -> Tokens:
  tokens = np.zeros((len(prompts), window), np.int32)
  for slot, ids in enumerate(prompts):
    tokens[slot, : len(ids)] = ids
  return Tokens(
    tokens=tokens, lengths=np.array([len(ids) for ids in prompts], np.int32)
  )


def _digest(rows: Mapping[int, Ids]) -> str:
  digest = hashlib.sha256()
  for row, of_row in rows.items():
    for ids in (of_row.student, of_row.teacher, of_row.given):
      digest.update(np.array([row, len(ids)], "<i4").tobytes())
      digest.update(ids.astype("<i4").tobytes())
    if of_row.answer is not None:
      digest.update(of_row.answer.encode())
  return digest.hexdigest()[:16]
