"""Rows of a data source, by the path that names it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd_jax.config import SourceConfig
from opd_jax.errors import InputError

Row = dict[str, Any]


def read(config: SourceConfig) -> list[Row]:
  """The rows of a source, in its own order.

  Raises:
    InputError: no such source, or one that cannot be read.
  """
  return read_jsonl(config.path)[: config.rows]


def where(config: SourceConfig, index: int) -> str:
  """The row of a source with this index, from 0, in words."""
  return f"{config.path}, line {index + 1}"


def read_jsonl(path: str | Path) -> list[Row]:
  """Rows of a JSONL file, each an object.

  Blank lines at the end are ignored.

  Raises:
    InputError: no file, no rows, or a row (named by its 1-based line) that is
      not JSON or not an object.
  """
  path = Path(path)
  if not path.is_file():
    raise InputError(
      f"no data file {path}; name a JSONL file, one object a line"
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
        '{"text": ...}'
      )
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
