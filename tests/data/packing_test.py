"""Packed rows: what lies where, the order, the counts, what is refused."""

import collections
import itertools
import json

import numpy as np
import pytest

from opd_jax import tokenizer
from opd_jax.config import SftDataConfig
from opd_jax.data import packing
from opd_jax.data.packing import PackedExamples, first_fit
from opd_jax.errors import InputError
from opd_jax.parsing import parse
from tests import pair

ROW = 16
END = 2


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokenizer")
  pair.write_tokenizer(folder)
  return tokenizer.load(folder)


@pytest.fixture
def small_windows(monkeypatch):
  monkeypatch.setattr(packing, "_WINDOW", 7)


def _write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return {
    "path": str(path),
    "prompt": {"text": "{q}"},
    "completion": "{a}",
  }


def _rows(count, letter="a"):
  """Prompts and completions of 1 to 5 letters each."""
  return [
    {"q": letter * (1 + index % 3), "a": "bcdef"[: 1 + index % 5]}
    for index in range(count)
  ]


def _packed(sources, tokens, *, rows=3, row_tokens=ROW, seed=0, **config):
  return PackedExamples(
    parse(SftDataConfig, {"sources": sources, **config}),
    tokens,
    seed=seed,
    rows=rows,
    row_tokens=row_tokens,
    vocab_size=tokens.id_count,
  )


def _arrays(batch):
  return (batch.tokens, batch.positions, batch.segments, batch.learned)


def _assert_same(left, right):
  assert left.examples == right.examples
  for one, other in zip(_arrays(left), _arrays(right), strict=True):
    np.testing.assert_array_equal(one, other)


def _naive_first_fit(lengths, size):
  rows = []
  for item, length in enumerate(lengths):
    for row in rows:
      if sum(lengths[other] for other in row) + length <= size:
        row.append(item)
        break
    else:
      rows.append([item])
  return rows


def test_first_fit_is_the_textbook_one():
  random = np.random.default_rng(0)
  for size in (1, 7, 20):
    for count in (0, 1, 40):
      lengths = random.integers(1, size + 1, count).tolist()
      assert first_fit(lengths, size) == _naive_first_fit(lengths, size)


def test_slots_hold_what_they_say(tokens, tmp_path):
  """Written out by hand: <s> aa | b </s>, then <s> c | de </s>."""
  rows = [{"q": "aa", "a": "b"}, {"q": "c", "a": "de"}]
  source = _write(tmp_path / "rows.jsonl", rows)
  packed = _packed({"x": source}, tokens, rows=1, row_tokens=12, shuffle=False)
  batch = next(packed)
  a, b, c, d, e = (tokens.encode(x, special_tokens=False)[0] for x in "abcde")
  np.testing.assert_array_equal(
    batch.tokens, [[1, a, a, b, END, 1, c, d, e, END, 0, 0]]
  )
  np.testing.assert_array_equal(
    batch.positions, [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, -1, -1]]
  )
  np.testing.assert_array_equal(
    batch.segments, [[0, 0, 0, 0, 0, 1, 1, 1, 1, 1, -1, -1]]
  )
  np.testing.assert_array_equal(
    np.flatnonzero(batch.learned[0]), [3, 4, 7, 8, 9]
  )
  assert batch.examples == ((0, 1),)
  assert packed.example(1).prompt_length == 2
  report = packed.report
  assert (report.rows, report.kept, report.longest) == (2, 2, 5)
  assert report.mean_length == 5
  assert report.used == pytest.approx(10 / 12)


def test_an_end_that_is_there_is_not_put_twice(tokens, tmp_path):
  source = _write(tmp_path / "rows.jsonl", [{"q": "a", "a": "b</s>"}])
  packed = _packed({"x": source}, tokens)
  assert packed.example(0).ids.tolist().count(END) == 1


def test_the_first_id_of_an_example_is_never_learned(tmp_path):
  """No prompt, and a tokenizer that puts nothing before a text either."""
  pair.write_tokenizer(tmp_path)
  file = tmp_path / "tokenizer.json"
  values = json.loads(file.read_text())
  file.write_text(json.dumps({**values, "post_processor": None}))
  source = _write(tmp_path / "rows.jsonl", _rows(5))
  source["prompt"] = {"text": ""}
  source["completion"] = "{q}{a}"
  packed = _packed({"x": source}, tokenizer.load(tmp_path))
  assert packed.example(0).prompt_length == 0
  for _ in range(4):
    batch = next(packed)
    np.testing.assert_array_equal(batch.learned, batch.positions > 0)


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_epoch_has_each_example_once(
  tokens, tmp_path, small_windows, shuffle
):
  """11 examples in windows of 7, over which epochs run on."""
  count = 11
  source = _write(tmp_path / "rows.jsonl", _rows(count))
  packed = _packed({"x": source}, tokens, rows=1, shuffle=shuffle)
  # Rows of whole windows: 11 windows of 7 are 7 epochs of 11.
  seen = collections.Counter()
  windows = []
  while True:
    batch = next(packed)
    if packed.get_state()["window"] == 11:
      break
    if packed.get_state()["window"] == len(windows):
      windows.append([])
    windows[-1].extend(batch.examples[0])
    seen.update(batch.examples[0])
  assert seen == dict.fromkeys(range(count), 7)
  used = [sorted(window) for window in windows]
  order = list(itertools.chain(*windows))
  if not shuffle:
    # Within a window first fit may move an example to an earlier row.
    endless = itertools.cycle(range(count))
    assert used == [sorted(itertools.islice(endless, 7)) for _ in range(11)]
  else:
    assert order[:count] != sorted(order[:count])


def test_rows_hold_no_more_than_they_can(tokens, tmp_path, small_windows):
  source = _write(tmp_path / "rows.jsonl", _rows(23))
  packed = _packed({"x": source}, tokens)
  for _ in range(20):
    batch = next(packed)
    for row, examples in enumerate(batch.examples):
      ids = [packed.example(index).ids for index in examples]
      filled = np.concatenate(ids)
      assert len(filled) <= ROW
      np.testing.assert_array_equal(batch.tokens[row, : len(filled)], filled)
      assert (batch.tokens[row, len(filled) :] == 0).all()
      assert (batch.positions[row] >= 0).sum() == len(filled)


@pytest.mark.parametrize("after", range(9))
def test_resume_continues_with_the_next_batch(
  tokens, tmp_path, small_windows, after
):
  """The stops lie within windows, at their ends, and in later epochs."""
  sources = {
    "a": _write(tmp_path / "a.jsonl", _rows(11)),
    "b": {**_write(tmp_path / "b.jsonl", _rows(4, "z")), "weight": 0.5},
  }
  whole = _packed(sources, tokens, seed=3)
  for _ in range(after):
    next(whole)
  state = json.loads(json.dumps(whole.get_state()))
  resumed = _packed(sources, tokens, seed=3)
  next(resumed)
  resumed.set_state(state)
  for _ in range(6):
    _assert_same(next(resumed), next(whole))


def test_the_seed_makes_the_order(tokens, tmp_path):
  sources = {"x": _write(tmp_path / "rows.jsonl", _rows(40))}
  first, same, other = (
    next(_packed(sources, tokens, seed=seed)) for seed in (0, 0, 1)
  )
  _assert_same(first, same)
  assert first.examples != other.examples


def test_sources_are_mixed_by_weight(tokens, tmp_path, small_windows):
  """3 of a to 1 of b, exactly, over whole rounds of the mixture."""
  sources = {
    "a": {**_write(tmp_path / "a.jsonl", _rows(8)), "weight": 1.5},
    "b": {**_write(tmp_path / "b.jsonl", _rows(8)), "weight": 0.5},
  }
  packed = _packed(sources, tokens, rows=1, shuffle=False)
  seen = collections.Counter()
  while True:
    batch = next(packed)
    if packed.get_state()["window"] == 400:
      break
    seen.update("ab"[index >= 8] for index in batch.examples[0])
  assert seen == {"a": 2100, "b": 700}


def test_long_and_empty_examples_are_counted_and_dropped(tokens, tmp_path):
  rows = [*_rows(3), {"q": "a" * 20, "a": "b"}, {"q": "a", "a": "b" * 13}]
  source = _write(tmp_path / "rows.jsonl", rows)
  report = _packed({"x": source}, tokens).report
  # <s>, 20 letters, 1, end; the last just fits: <s>, 1, 13, end.
  assert (report.rows, report.kept, report.dropped) == (5, 4, 1)
  assert (report.longest, report.longest_kept) == (23, 16)


def test_a_row_with_an_empty_completion_is_not_used(tokens, tmp_path):
  """Nor one that ends at once by its own text; a prompt may be empty."""
  rows = [
    {"q": "a", "a": ""},
    {"q": "b", "a": "c"},
    {"q": "d", "a": "</s>"},
    {"q": "", "a": "e"},
  ]
  source = _write(tmp_path / "rows.jsonl", rows)
  packed = _packed({"x": source}, tokens)
  report = packed.report
  assert (report.rows, report.kept, report.empty) == (4, 2, 2)
  assert [len(packed.example(index).ids) for index in range(2)] == [4, 3]
  _write(tmp_path / "rows.jsonl", [rows[0]] * 3)
  with pytest.raises(InputError, match="and 3 have an empty completion"):
    _packed({"x": source}, tokens)


def test_nothing_left_is_an_error(tokens, tmp_path):
  sources = {
    "good": _write(tmp_path / "good.jsonl", _rows(3)),
    "bad": _write(tmp_path / "bad.jsonl", [{"q": "a" * 20, "a": "b"}] * 2),
  }
  with pytest.raises(
    InputError,
    match=r"data\.sources\.bad .* 2 are longer than batch\.row_tokens = 16 "
    r"\(the longest has 23 ids\) and 0 .* raise batch\.row_tokens",
  ):
    _packed(sources, tokens)


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
  pair.write_tokenizer(tmp_path)
  (tmp_path / "generation_config.json").unlink()
  config = json.loads((tmp_path / "tokenizer_config.json").read_text())
  del config["eos_token"]
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  source = _write(tmp_path / "rows.jsonl", _rows(3))
  with pytest.raises(InputError, match=r"no end-of-sequence id.*eos_token"):
    _packed({"x": source}, tokenizer.load(tmp_path))


def test_a_missing_completion_names_line_and_field(tokens, tmp_path):
  source = _write(tmp_path / "rows.jsonl", [*_rows(2), {"q": "a"}])
  with pytest.raises(InputError, match=r"line 3: no field 'a'.*completion"):
    _packed({"x": source}, tokens)


def test_changed_examples_are_refused(tokens, tmp_path):
  sources = {"x": _write(tmp_path / "rows.jsonl", _rows(5))}
  state = _packed(sources, tokens).get_state()
  _write(tmp_path / "rows.jsonl", [*_rows(4), {"q": "z", "a": "z"}])
  with pytest.raises(InputError, match="the examples changed"):
    _packed(sources, tokens).set_state(state)
