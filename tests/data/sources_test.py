"""Which reader a path means, and what a row is called."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opd_jax import arith
from opd_jax.config import SftDataConfig, SourceConfig, TemplateConfig
from opd_jax.data import sources
from opd_jax.errors import InputError
from tests.data.letters import write_rows


def test_a_path_says_what_it_is(tmp_path):
  rows = [{"text": letter} for letter in "abc"]
  jsonl = write_rows(tmp_path / "rows.jsonl", "abc")
  parquet = str(tmp_path / "rows.parquet")
  pq.write_table(pa.Table.from_pylist(rows), parquet)
  for path in (jsonl, parquet):
    assert sources.read(SourceConfig(path=path)) == rows
    assert sources.read(SourceConfig(path=path, rows=2)) == rows[:2]
  assert sources.where(SourceConfig(path=jsonl), 1) == f"{jsonl}, line 2"
  assert sources.where(SourceConfig(path=parquet), 1) == f"{parquet}, row 2"


def test_tasks_are_sources():
  options = {"levels": (1,), "rows": 20}
  task = SourceConfig(path="arith", split="test", options=options, rows=5)
  assert sources.read(task) == arith.rows(options, "test")[:5]
  assert sources.where(task, 0) == "arith (test), row 1"
  dataset = SourceConfig(path="tfds:gsm8k", split="train[:9]")
  assert sources.where(dataset, 8) == "tfds:gsm8k (train[:9]), row 9"


@pytest.mark.parametrize("path", ["nowhere", "rows.json", "gsm8k", "Arith"])
def test_an_unknown_source_names_what_there_is(path):
  with pytest.raises(InputError) as error:
    sources.read(SourceConfig(path=path))
  message = str(error.value)
  for part in (repr(path), "FILE.jsonl", "FILE.parquet", "tfds:NAME", "arith"):
    assert part in message


def test_a_file_has_no_splits_and_options(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_text(json.dumps({"text": "a"}))
  with pytest.raises(InputError, match="leave out split, got 'test'"):
    sources.read(SourceConfig(path=str(path), split="test"))
  with pytest.raises(InputError, match=r"and options, got .'rows': 3"):
    sources.read(SourceConfig(path=str(path), options={"rows": 3}))


def test_fine_tuning_has_no_teacher():
  source = SourceConfig(path="arith", teacher_prompt=TemplateConfig())
  with pytest.raises(
    InputError, match=r"sources\.sums\.teacher_prompt .*`train`"
  ):
    SftDataConfig(sources={"sums": source})


def test_ids_are_checked():
  sources.check_ids([], 1, "here")
  sources.check_ids([0, 9], 10, "here")
  with pytest.raises(
    InputError, match=r"here: the tokenizer gives id 10, .*0 to 9"
  ):
    sources.check_ids([10, 3], 10, "here")


def test_within_read_once_a_source_is_read_once(monkeypatch):
  made = []

  def rows(options, split):
    made.append((dict(options), split))
    return [{"n": n} for n in range(options["rows"])]

  monkeypatch.setitem(sources.TASKS, "arith", rows)

  def read(**changes):
    values = {"path": "arith", "options": {"rows": 9}, **changes}
    return len(sources.read(SourceConfig(**values)))

  assert (read(), read(), len(made)) == (9, 9, 2)
  with sources.read_once():
    found = read(), read(rows=2), read(), read(prompt=TemplateConfig())
    assert found == (9, 2, 9, 9)
    assert len(made) == 3
    with sources.read_once():
      read()
    assert len(made) == 3
    assert (read(split="test"), read(options={"rows": 5})) == (9, 5)
    assert made[3:] == [({"rows": 9}, "test"), ({"rows": 5}, "train")]
  read()
  assert len(made) == 6
