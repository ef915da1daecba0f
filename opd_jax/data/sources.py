"""Rows of a data source, by the path that names it."""

from collections.abc import Sequence
from pathlib import Path

from opd_jax import arith
from opd_jax.config import SourceConfig
from opd_jax.data import tfds
from opd_jax.data.files import Row, read_jsonl, read_parquet
from opd_jax.errors import InputError

# What makes the rows of a task: of its options and the split.
TASKS = {"arith": arith.rows}

# What reads a file with this ending.
FILES = {".jsonl": read_jsonl, ".parquet": read_parquet}

_TFDS = "tfds:"


def read(config: SourceConfig) -> list[Row]:
  """The rows of a source, in its own order.

  Raises:
    InputError: no such source, or one that cannot be read.
  """
  path = config.path
  if path in TASKS:
    rows = TASKS[path](config.options, config.split)
  elif path.startswith(_TFDS):
    rows = tfds.read(path.removeprefix(_TFDS), config.split, config.options)
  elif Path(path).suffix in FILES:
    _check_file(config)
    rows = FILES[Path(path).suffix](path)
  else:
    raise InputError(
      f"unknown data source {path!r}; name a file (FILE{', FILE'.join(FILES)}),"
      f" {_TFDS}NAME for a TensorFlow Dataset, or a task ({', '.join(TASKS)})"
    )
  return rows[: config.rows]


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
