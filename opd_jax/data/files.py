"""Rows of JSONL and Parquet files."""

import datetime
import decimal
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from opd_jax import storage
from opd_jax.errors import InputError

Row = dict[str, Any]

# What JSON has no form for.
_TIMES = datetime.date | datetime.time
_OTHERS = datetime.timedelta | decimal.Decimal


# Which rows to read, of their number.
Pick = Callable[[int], range]


def read_jsonl(path: str | Path, pick: Pick = range) -> list[Row]:
  """Rows of a JSONL file, each an object.

  Blank lines at the end are ignored.

  Args:
    path: of the file.
    pick: the rows to read, of how many there are; all by default.

  Raises:
    InputError: no file, no rows, or a row (named by its 1-based line) that is
      not JSON or not an object.
  """
  file = storage.to_path(path)
  if not file.is_file():
    raise InputError(
      f"no data file {path}; name a JSONL file, one object a line"
    )
  lines = file.read_bytes().rstrip().split(b"\n")
  if lines == [b""]:
    raise InputError(f"data file {path} has no rows; write one object a line")
  rows = []
  for index in pick(len(lines)):
    where = f"{path}, line {index + 1}"
    try:
      row = json.loads(lines[index])
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


def read_parquet(path: str | Path, pick: Pick = range) -> list[Row]:
  """Rows of a Parquet file, its columns as fields.

  Lists and structs become lists and dicts, binary columns, dates, times and
  decimals text.

  Args:
    path: of the file.
    pick: the rows to read, of how many there are; all by default.

  Raises:
    InputError: no file, one that is no Parquet file, or no rows.
  """
  import pyarrow
  import pyarrow.parquet

  file = storage.to_path(path)
  if not file.is_file():
    raise InputError(f"no data file {path}; name a Parquet file")
  try:
    # One thread: a pool of threads would outlive the reading.
    with file.open("rb") as opened:
      table = pyarrow.parquet.ParquetFile(opened).read(use_threads=False)
  except (pyarrow.ArrowException, OSError) as error:
    raise InputError(
      f"cannot read {path} as Parquet: {error}; write it again, or use JSONL"
    ) from error
  if not table.num_rows:
    raise InputError(f"data file {path} has no rows")
  rows = pick(table.num_rows)
  part = table.slice(rows.start, len(rows))
  return [plain(row) for row in part.to_pylist()]


def plain(value: Any) -> Any:
  """A value as text, numbers, lists and dicts.

  Bytes become text where they are UTF-8, numpy's arrays and scalars lists and
  numbers, dates and times their ISO 8601 text, decimals and durations their
  usual text ("12.50", "1:30:00"). All else stays as it is.
  """
  if isinstance(value, bytes):
    try:
      return value.decode()
    except UnicodeDecodeError:
      return value
  if isinstance(value, _TIMES):
    return value.isoformat()
  if isinstance(value, _OTHERS):
    return str(value)
  if isinstance(value, Mapping):
    return {key: plain(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [plain(item) for item in value]
  if hasattr(value, "tolist"):
    return plain(value.tolist())
  return value
