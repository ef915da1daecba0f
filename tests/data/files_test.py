"""JSONL and Parquet files as rows."""

import datetime
import decimal
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opd_jax.data import files
from opd_jax.errors import InputError


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (None, "no data file"),
    (b"\n\n", "has no rows"),
    (b'{"text": "a"}\n{"text": }\n', "line 2: not valid JSON .*column 10"),
    (b'{"text": "a"}\n\n{"text": "b"}\n', "line 2: not valid JSON"),
    (b"[1]\n", "line 1: expected an object, got list"),
    (b'{"text": "\xff"}\n', "line 1: not valid JSON .*utf-8"),
  ],
)
def test_bad_jsonl_is_named_with_its_line(tmp_path, content, message):
  path = tmp_path / "rows.jsonl"
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(InputError, match=message):
    files.read_jsonl(path)


def test_jsonl_keeps_odd_line_separators_and_ignores_blank_ends(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_bytes('{"text": "a\u2028b", "x": 1}\r\n{"text": ""}\n\n'.encode())
  assert files.read_jsonl(path) == [
    {"text": "a\u2028b", "x": 1},
    {"text": ""},
  ]


def test_parquet_rows_are_those_written(tmp_path):
  rows = [
    {
      "q": "α",
      "n": n,
      "x": n / 3,
      "messages": [{"role": "user", "content": "a"}],
    }
    for n in range(7)
  ]
  path = tmp_path / "rows.parquet"
  # Small groups: rows must come in order across them.
  pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
  assert files.read_parquet(path) == rows


def test_parquet_binary_columns_are_text(tmp_path):
  path = tmp_path / "rows.parquet"
  table = pa.table({"t": pa.array(["é".encode(), None, b"\xff"], pa.binary())})
  pq.write_table(table, path)
  assert files.read_parquet(path) == [{"t": "é"}, {"t": None}, {"t": b"\xff"}]


def test_parquet_dates_times_and_decimals_are_text(tmp_path):
  """So that they are of use in templates, and can be written as JSON."""
  row = {
    "day": datetime.date(2024, 2, 29),
    "at": datetime.datetime(2024, 2, 29, 12, 30),
    "zone": datetime.datetime(2024, 2, 29, 12, 30, tzinfo=datetime.UTC),
    "time": datetime.time(12, 30),
    "span": datetime.timedelta(minutes=90),
    "price": decimal.Decimal("12.50"),
    "list": [decimal.Decimal("1.0")],
  }
  path = tmp_path / "rows.parquet"
  pq.write_table(pa.Table.from_pylist([row]), path)
  (found,) = files.read_parquet(path)
  assert found == {
    "day": "2024-02-29",
    "at": "2024-02-29T12:30:00",
    "zone": "2024-02-29T12:30:00+00:00",
    "time": "12:30:00",
    "span": "1:30:00",
    "price": "12.50",
    "list": ["1.0"],
  }
  assert json.loads(json.dumps(found)) == found


def test_bad_parquet(tmp_path):
  path = tmp_path / "rows.parquet"
  with pytest.raises(InputError, match=r"no data file .*rows\.parquet"):
    files.read_parquet(path)
  path.write_text(json.dumps({"text": "a"}))
  with pytest.raises(
    InputError, match=r"cannot read .*as Parquet: .*use JSONL"
  ):
    files.read_parquet(path)
  pq.write_table(pa.table({"t": pa.array([], pa.string())}), path)
  with pytest.raises(InputError, match="no rows"):
    files.read_parquet(path)


def test_plain_values():
  value = {
    "scalar": np.float32(0.5),
    "array": np.array([[1, 2]]),
    "words": np.array([b"a", "ü".encode()], object),
    "list": (b"x", [np.int64(3)]),
    "none": None,
  }
  found = files.plain(value)
  assert found == {
    "scalar": 0.5,
    "array": [[1, 2]],
    "words": ["a", "ü"],
    "list": ["x", [3]],
    "none": None,
  }
  assert type(found["list"][1][0]) is int
