"""Rows of a data source, by the path that names it."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import jax

from opd_jax import arith, processes
from opd_jax.config import SourceConfig
from opd_jax.data import tfds
from opd_jax.data.files import Row, read_jsonl, read_parquet
from opd_jax.errors import InputError

# What makes the rows of a task: of its options and the split.
TASKS = {"arith": arith.rows}

# What reads a file with this ending.
FILES = {".jsonl": read_jsonl, ".parquet": read_parquet}

_TFDS = "tfds:"


# What `read` has read, by path, split and options; None outside `read_once`.
_Kept = list[tuple[tuple[str, str, Mapping[str, Any]], list[Row]]]
_kept: ContextVar[_Kept | None] = ContextVar("_kept", default=None)


@contextlib.contextmanager
def read_once() -> Iterator[None]:
  """Within it `read` keeps all rows, and reads no source a second time."""
  if _kept.get() is not None:
    yield
    return
  token = _kept.set([])
  try:
    yield
  finally:
    _kept.reset(token)


def read(config: SourceConfig) -> list[Row]:
  """The rows of a source, in its own order.

  Raises:
    InputError: no such source, or one that cannot be read.
  """
  kept = _kept.get()
  if kept is None:
    return _read(config)[: config.rows]
  key = (config.path, config.split, config.options)
  for other, rows in kept:
    if other == key:
      return rows[: config.rows]
  kept.append((key, _read(config)))
  return kept[-1][1][: config.rows]


def read_share(config: SourceConfig) -> tuple[int, list[Row]]:
  """This process's share of the rows: the index of its first, and the rows.

  Of a file no others are parsed.

  Raises:
    InputError: no such source, or one that cannot be read.
  """
  suffix = Path(config.path).suffix
  if jax.process_count() == 1 or suffix not in FILES:
    rows = read(config)
    mine = processes.share(len(rows))
    return mine.start, rows[mine.start : mine.stop]
  _check_file(config)
  mine = range(0)

  def pick(count: int) -> range:
    nonlocal mine
    mine = processes.share(min(count, config.rows or count))
    return mine

  rows = FILES[suffix](config.path, pick)
  return mine.start, rows


def _read(config: SourceConfig) -> list[Row]:
  path = config.path
  if path in TASKS:
    return TASKS[path](config.options, config.split)
  if path.startswith(_TFDS):
    name = path.removeprefix(_TFDS)
    return tfds.read(name, config.split, config.options)
  if Path(path).suffix in FILES:
    _check_file(config)
    return FILES[Path(path).suffix](path)
  raise InputError(
    f"unknown data source {path!r}; name a file (FILE{', FILE'.join(FILES)}),"
    f" {_TFDS}NAME for a TensorFlow Dataset, or a task ({', '.join(TASKS)})"
  )


def where(config: SourceConfig, index: int) -> str:
  """The row of a source with this index, from 0, in words."""
  path = config.path
  if Path(path).suffix == ".jsonl":
    return f"{path}, line {index + 1}"
  if path in TASKS or path.startswith(_TFDS):
    return f"{path} ({config.split}), row {index + 1}"
  return f"{path}, row {index + 1}"


def check_ids(ids: Sequence[int], vocab_size: int, where: str) -> None:
  """Raises InputError if a text has an id that a model has no row for."""
  largest = max(ids, default=0)
  if largest >= vocab_size:
    raise InputError(
      f"{where}: the tokenizer gives id {largest}, but the models have "
      f"ids 0 to {vocab_size - 1}; use the tokenizer that belongs to them, or "
      "texts without its added tokens"
    )


def _check_file(config: SourceConfig) -> None:
  if config.split != "train" or config.options:
    raise InputError(
      f"{config.path} is a file, which has no splits and no options; leave out "
      f"split, got {config.split!r}, and options, got {dict(config.options)}"
    )
