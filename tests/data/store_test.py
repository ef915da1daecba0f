"""The file of a store: what is written comes back, what is none is refused."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opd_jax.data import files, store
from opd_jax.errors import InputError

ORIGIN = store.Origin(
  model="teacher",
  weights="w",
  tokenizer="t",
  sampling={"temperature": 1.0, "stop_ids": [2]},
  seed=3,
  samples=2,
)
SOURCE = [{"question": "a", "level": 1}, {"question": "b", "tags": ["x"]}]


def rows():
  for row in SOURCE:
    for sample in range(store._GROUP):  # More than one row group.
      yield {
        "prompt": row["question"],
        **row,
        "prompt_ids": (1, 2),
        "completion": "c",
        "completion_ids": (sample, 5),
        "logprobs": (-0.5, -0.25),
        "stopped": sample % 2 == 0,
      }


def test_what_is_written_comes_back(tmp_path):
  path = tmp_path / "new" / "store.parquet"
  assert store.write(path, SOURCE, rows(), ORIGIN) == 2 * store._GROUP
  assert store.read_origin(path) == ORIGIN
  assert [path] == list(path.parent.iterdir())
  absent = {"level": None, "tags": None}
  expected = [
    {
      **absent,
      **row,
      **{
        name: list(row[name])
        for name in ("prompt_ids", "completion_ids", "logprobs")
      },
    }
    for row in rows()
  ]
  assert files.read_parquet(path) == expected
  schema = pq.read_schema(path)
  assert schema.field("completion_ids").type == pa.list_(pa.int32())
  assert schema.field("logprobs").type == pa.list_(pa.float32())
  assert pq.ParquetFile(path).num_row_groups == 2


def test_an_interrupted_write_leaves_nothing(tmp_path):
  def broken():
    yield from rows()
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    store.write(tmp_path / "store.parquet", SOURCE, broken(), ORIGIN)
  assert not list(tmp_path.iterdir())


def test_a_field_of_two_types_is_named(tmp_path):
  source = [{"level": 1}, {"level": "two"}]
  with pytest.raises(InputError, match="field 'level' has no one type"):
    store.write(tmp_path / "store.parquet", source, iter(()), ORIGIN)


def test_what_is_no_store_is_refused(tmp_path):
  path = tmp_path / "other.parquet"
  with pytest.raises(InputError, match="is no file of stored completions"):
    store.read_origin(path)
  with pytest.raises(InputError, match="is no file of stored completions"):
    store.read_origin(__file__)
  path.write_text("text")
  with pytest.raises(InputError, match=r"cannot read .* as Parquet"):
    store.read_origin(path)
  pq.write_table(pa.table({"completion": ["x"]}), path)
  with pytest.raises(InputError, match=r"holds no ids .* opd-jax generate"):
    store.read_origin(path)
  text = json.dumps({**vars(ORIGIN), "version": 2})
  schema = pa.schema({}, metadata={"opd_jax.store": text})
  pq.write_table(schema.empty_table(), path)
  with pytest.raises(InputError, match=r"version 2, .* reads version 1"):
    store.read_origin(path)


def test_ids_belong_to_their_prompt_and_end_where_this_run_ends():
  row = {"prompt_ids": [1, 2], "completion_ids": [7, 8, 2]}
  assert store.given_ids(row, (1, 2), (2,), "row 1") == (7, 8, 2)
  with pytest.raises(InputError, match=r"row 1: .* 2 ids, \[1, 2\].*makes 1,"):
    store.given_ids(row, (1,), (2,), "row 1")
  with pytest.raises(InputError, match=r"row 1: .* behind id 8.*stop_ids"):
    store.given_ids(row, (1, 2), (2, 8), "row 1")
