"""Prompts: what rows become, and an order that resumes."""

import collections
import json

import jax
import numpy as np
import pytest

from opd_jax import processes, tokenizer
from opd_jax.config import DataConfig, SourceConfig, TemplateConfig
from opd_jax.data import files
from opd_jax.data.preparing import PromptReport
from opd_jax.data.prompts import Prompts
from opd_jax.errors import InputError
from tests.data.letters import Letters, write_rows


def make_prompts(path, *, seed=0, batch_size=4, source=None, **options):
  return Prompts(
    DataConfig(
      sources={"rows": SourceConfig(path=str(path), **(source or {}))},
      **({"max_prompt_tokens": 8} | options),
    ),
    Letters(),
    Letters(),
    seed=seed,
    batch_size=batch_size,
    vocab_size=128,
  )


@pytest.fixture
def letters(tmp_path):
  """Ten rows of one letter each."""
  return write_rows(tmp_path / "letters.jsonl", "abcdefghij")


def take(prompts, batches):
  return [row for _ in range(batches) for row in next(prompts).rows]


def test_every_epoch_has_every_row_once_in_a_new_order(letters):
  rows = take(make_prompts(letters), 15)  # 60 rows: six epochs of ten.
  epochs = [tuple(rows[i : i + 10]) for i in range(0, 60, 10)]
  assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
  assert len(set(epochs)) == 6
  assert take(make_prompts(letters), 15) == rows
  assert take(make_prompts(letters, seed=1), 15) != rows
  plain = take(make_prompts(letters, shuffle=False), 5)
  assert plain == [i % 10 for i in range(20)]


def test_restored_iterator_goes_on_across_epochs(letters):
  whole = make_prompts(letters)
  expected = [next(whole).rows for _ in range(9)]
  for stop in (0, 2, 3, 7):
    first = make_prompts(letters)
    take(first, stop)
    state = json.loads(json.dumps(first.get_state()))
    second = make_prompts(letters)
    take(second, 1)
    second.set_state(state)
    assert [next(second).rows for _ in range(9 - stop)] == expected[stop:]


def test_state_of_other_prompts_is_refused(letters, tmp_path):
  state = make_prompts(letters).get_state()
  other = make_prompts(write_rows(tmp_path / "other.jsonl", "abcdefghix"))
  with pytest.raises(InputError, match="the prompts changed"):
    other.set_state(state)
  shown = {"teacher_prompt": TemplateConfig(text="{text}!")}
  with pytest.raises(InputError, match="the prompts changed"):
    make_prompts(letters, source=shown).set_state(state)


def test_rows_become_left_aligned_ids(tmp_path):
  path = write_rows(tmp_path / "rows.jsonl", ["a\nb", "", "0123456789", "xy"])
  prompts = make_prompts(
    path,
    shuffle=False,
    batch_size=3,
    source={"prompt": TemplateConfig(replace_newlines="-")},
  )
  batch = next(prompts)
  expected = np.zeros((3, 8), np.int32)
  for slot, text in enumerate(["a-b", "23456789", "xy"]):
    expected[slot, : len(text)] = Letters().encode(text)
  np.testing.assert_array_equal(batch.tokens, expected)
  np.testing.assert_array_equal(batch.lengths, [3, 8, 2])
  assert batch.tokens.dtype == batch.lengths.dtype == np.int32
  assert batch.rows == (0, 2, 3)
  assert batch.teacher is None
  assert prompts.teacher_window is None
  assert prompts.report == PromptReport(
    rows=4,
    kept=3,
    truncated=1,
    dropped=0,
    empty=1,
    longest=10,
    mean_length=13 / 3,
  )


def test_overlong_rows_are_dropped_or_an_error(tmp_path):
  path = write_rows(tmp_path / "rows.jsonl", ["ab", "0123456789"])
  report = make_prompts(path, overlong="drop").report
  assert (report.kept, report.dropped, report.truncated) == (1, 1, 0)
  with pytest.raises(InputError, match=r"line 2: the prompt has 10 .* is 8"):
    make_prompts(path, overlong="error")
  # The first ids are a continuation task: nothing is too long then.
  first = make_prompts(
    path,
    overlong="error",
    shuffle=False,
    source={"prompt": TemplateConfig(first_tokens=3)},
  )
  np.testing.assert_array_equal(next(first).tokens[1, :4], [48, 49, 50, 0])
  with pytest.raises(InputError, match=r"none of the 2 rows .*'rows'.* has 10"):
    make_prompts(path, overlong="drop", max_prompt_tokens=1)


def test_the_teacher_reads_prompts_of_its_own(tmp_path):
  rows = [{"q": "ab", "hint": "h"}, {"q": "c", "hint": "0123456789"}]
  path = write_rows(tmp_path / "rows.jsonl", rows)
  source = {
    "prompt": TemplateConfig(text="{q}?"),
    "teacher_prompt": TemplateConfig(text="{hint}{q}", chat=True),
  }
  prompts = make_prompts(
    path, shuffle=False, batch_size=2, max_prompt_tokens=20, source=source
  )
  batch = next(prompts)
  # "u:hab;a:" and "u:0123456789c;a:": the window is the longest, not 20.
  assert batch.teacher is not None
  np.testing.assert_array_equal(batch.teacher.lengths, [8, 16])
  assert batch.teacher.tokens.shape == (2, 16)
  assert prompts.teacher_window == 16
  assert bytes(batch.teacher.tokens[0].tolist()) == b"u:hab;a:" + bytes(8)
  assert bytes(batch.tokens[0, :4].tolist()) == b"ab?\0"
  # Cut on the left like any prompt, and counted.
  cut = make_prompts(path, shuffle=False, batch_size=2, source=source)
  batch = next(cut)
  assert batch.teacher is not None
  assert bytes(batch.teacher.tokens[1].tolist()) == b"6789c;a:"
  assert (cut.report.truncated, cut.report.longest) == (1, 3)
  with pytest.raises(InputError, match=r"line 2: the teacher's prompt has 16"):
    make_prompts(path, overlong="error", source=source)
  dropped = make_prompts(path, overlong="drop", source=source)
  assert (dropped.report.kept, dropped.report.dropped) == (1, 1)


def test_examples_show_rows_and_both_prompts(tmp_path):
  path = write_rows(tmp_path / "rows.jsonl", [{"text": "ab", "n": 1}, "c", "d"])
  source = {"teacher_prompt": TemplateConfig(text="{text}!")}
  prompts = make_prompts(path, source=source)
  first, second = prompts.examples(2)
  assert (first.source, first.index, first.where) == (
    "rows",
    0,
    f"{path}, line 1",
  )
  assert first.row == {"text": "ab", "n": 1}
  assert (first.student.text, first.student.ids) == ("ab", (97, 98))
  assert first.teacher is not None
  assert first.teacher.text == "ab!"
  assert second.student.text == "c"
  assert len(prompts.examples()) == 3
  assert make_prompts(path).examples(1)[0].teacher is None


def test_real_stories(shared_data):
  words = tokenizer.load(shared_data / "models" / "babyllama-student")
  path = shared_data / "tinystories" / "valid.jsonl"
  template = TemplateConfig(replace_newlines=" ", first_tokens=32)
  prompts = Prompts(
    DataConfig(
      sources={"s": SourceConfig(path=str(path), prompt=template)},
      max_prompt_tokens=32,
    ),
    words,
    seed=0,
    batch_size=20,
    vocab_size=words.id_count,
  )
  texts = [json.loads(line)["text"] for line in path.read_bytes().splitlines()]
  assert (prompts.report.rows, prompts.report.kept) == (300, 300)
  seen = collections.Counter()
  for _ in range(15):
    batch = next(prompts)
    seen.update(batch.rows)
    assert (batch.tokens[:, 0] == dict(words.special_ids)["bos"]).all()
    for ids, row in zip(batch.tokens, batch.rows, strict=True):
      text = texts[row].replace("\n", " ")
      assert text.startswith(words.decode(ids.tolist()))
  assert len(seen) == 300
  assert set(seen.values()) == {1}


def test_ids_and_texts_that_no_model_can_read(tmp_path):
  path = write_rows(tmp_path / "rows.jsonl", ["abc", "aé"])
  with pytest.raises(InputError, match=r"line 2: the tokenizer gives id 233"):
    make_prompts(path)
  source = {"teacher_prompt": TemplateConfig(text="{text}~")}
  plain = write_rows(tmp_path / "plain.jsonl", ["abc"])
  config = DataConfig(sources={"rows": SourceConfig(path=plain, **source)})
  options = {"seed": 0, "batch_size": 1, "vocab_size": 100}
  # "~" is 126: too much for the student's ids, not for the teacher's own.
  with pytest.raises(InputError, match=r"line 1: the tokenizer gives id 126"):
    Prompts(config, Letters(), Letters(), **options)
  Prompts(config, Letters(), Letters(), **options, teacher_vocab_size=128)
  bad = tmp_path / "bad.jsonl"
  bad.write_text('{"text": "a"}\n{"text": "a \\ud800"}\n')
  with pytest.raises(InputError, match=r"line 2: field 'text' is not valid"):
    make_prompts(str(bad))


def shared(monkeypatch, count):
  """Makes one process do the shares of many; counts the rows each parses."""
  parsed = []
  loads = json.loads

  def exchange(make):
    found = []
    for index in range(count):
      monkeypatch.setattr(jax, "process_index", lambda index=index: index)
      parsed.append(0)
      found.append(make())
    return found

  def counted(text):
    parsed[-1] += 1
    return loads(text)

  monkeypatch.setattr(jax, "process_count", lambda: count)
  monkeypatch.setattr(processes, "exchange", exchange)
  monkeypatch.setattr(files.json, "loads", counted)
  return parsed


@pytest.mark.parametrize("rows", [None, 7, 2])
def test_processes_read_a_share_each(letters, monkeypatch, rows):
  """Of the first rows, if `rows` says so; some may have none."""
  options = {"source": {"rows": rows}}
  alone = make_prompts(letters, **options)
  expected = [next(alone) for _ in range(3)]
  parsed = shared(monkeypatch, 4)
  together = make_prompts(letters, **options)
  total = rows or 10
  assert sum(parsed) == total
  assert max(parsed) - min(parsed) <= 1
  assert together.report == alone.report
  assert together.get_state() == make_prompts(letters, **options).get_state()
  for batch in expected:
    found = next(together)
    assert found.rows == batch.rows
    np.testing.assert_array_equal(found.tokens, batch.tokens)
    np.testing.assert_array_equal(found.lengths, batch.lengths)


def test_a_share_names_its_rows_as_the_whole_does(tmp_path, monkeypatch):
  path = write_rows(tmp_path / "rows.jsonl", ["a", "b", "c", "d" * 9])
  with pytest.raises(InputError) as alone:
    make_prompts(path, overlong="error")
  shared(monkeypatch, 2)
  with pytest.raises(InputError) as together:
    make_prompts(path, overlong="error")
  assert "line 4" in str(alone.value)
  assert str(together.value) == str(alone.value)
