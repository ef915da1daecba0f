"""Prompts: what rows become, and an order that resumes."""

import collections
import json

import numpy as np
import pytest

from opd_jax import config, data, tokenizer
from opd_jax.errors import InputError


def write_rows(path, texts):
  path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
  return str(path)


def encode(text):
  return [ord(character) for character in text]


def make_prompts(path, *, seed=0, batch_size=4, **options):
  return data.Prompts(
    config.DataConfig(path=path, **({"max_prompt_tokens": 8} | options)),
    encode,
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


def test_rows_become_left_aligned_ids(tmp_path):
  path = write_rows(tmp_path / "rows.jsonl", ["a\nb", "", "0123456789", "xy"])
  prompts = make_prompts(
    path, shuffle=False, replace_newlines="-", batch_size=3
  )
  batch = next(prompts)
  expected = np.zeros((3, 8), np.int32)
  for slot, text in enumerate(["a-b", "23456789", "xy"]):
    expected[slot, : len(text)] = encode(text)
  np.testing.assert_array_equal(batch.tokens, expected)
  np.testing.assert_array_equal(batch.lengths, [3, 8, 2])
  assert batch.tokens.dtype == batch.lengths.dtype == np.int32
  assert batch.rows == (0, 2, 3)
  assert batch.texts == ("a\nb", "0123456789", "xy")
  assert prompts.report == data.PromptReport(
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
  first = make_prompts(path, overlong="error", prompt_tokens=3, shuffle=False)
  np.testing.assert_array_equal(next(first).tokens[1, :4], [48, 49, 50, 0])
  with pytest.raises(InputError, match=r"none of the 2 rows .* has 10"):
    make_prompts(path, overlong="drop", max_prompt_tokens=1)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (None, "no data file"),
    (b"\n\n", "has no rows"),
    (b'{"text": "a"}\n{"text": }\n', "line 2: not valid JSON .*column 10"),
    (b'{"text": "a"}\n\n{"text": "b"}\n', "line 2: not valid JSON"),
    (b"[1]\n", "line 1: expected an object, got list"),
    (b'{"a": 1, "b": 2}\n', "line 1: no field 'text'; the row has a, b"),
    (b'{"text": 7}\n', "line 1: field 'text' must be a string, got int"),
    (b'{"text": "\xff"}\n', "line 1: not valid JSON .*utf-8"),
  ],
)
def test_bad_files_are_named_with_their_line(tmp_path, content, message):
  path = tmp_path / "rows.jsonl"
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(InputError, match=message):
    data.read_jsonl(path, "text")


def test_read_jsonl_keeps_odd_line_separators_and_ignores_blank_ends(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_bytes('{"text": "a\u2028b", "x": 1}\r\n{"text": ""}\n\n'.encode())
  assert data.read_jsonl(path, "text") == [
    {"text": "a\u2028b", "x": 1},
    {"text": ""},
  ]


def test_real_stories(shared_data):
  words = tokenizer.load(shared_data / "models" / "babyllama-student")
  prompts = data.Prompts(
    config.DataConfig(
      path=str(shared_data / "tinystories" / "valid.jsonl"),
      replace_newlines=" ",
      prompt_tokens=32,
      max_prompt_tokens=32,
    ),
    words.encode,
    seed=0,
    batch_size=20,
    vocab_size=words.id_count,
  )
  assert (prompts.report.rows, prompts.report.kept) == (300, 300)
  seen = collections.Counter()
  for _ in range(15):
    batch = next(prompts)
    seen.update(batch.rows)
    assert (batch.tokens[:, 0] == dict(words.special_ids)["bos"]).all()
    for ids, text in zip(batch.tokens, batch.texts, strict=True):
      assert text.replace("\n", " ").startswith(words.decode(ids.tolist()))
  assert len(seen) == 300
  assert set(seen.values()) == {1}


def test_ids_and_texts_that_no_model_can_read(tmp_path):
  path = write_rows(tmp_path / "rows.jsonl", ["abc", "aé"])
  with pytest.raises(InputError, match=r"line 2: the tokenizer gives id 233"):
    make_prompts(path)
  bad = tmp_path / "bad.jsonl"
  bad.write_text('{"text": "a"}\n{"text": "a \\ud800"}\n')
  with pytest.raises(InputError, match=r"line 2: field 'text' is not valid"):
    make_prompts(str(bad))
