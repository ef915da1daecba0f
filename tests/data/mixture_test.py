"""Mixtures: shares of the sources, their epochs, and an order that resumes."""

import collections
import json

import pytest

from opd_jax.config import DataConfig, SourceConfig, TemplateConfig
from opd_jax.data.prompts import Prompts
from opd_jax.errors import InputError
from tests.data.letters import Letters, write_rows

SIZES = {"few": 5, "some": 10, "many": 40}
WEIGHTS = {"few": 1.0, "some": 0.5, "many": 2.5}


def make_mixture(folder, *, batch_size=8, weights=WEIGHTS, **options):
  sources = {}
  for name, size in SIZES.items():
    path = write_rows(
      folder / f"{name}.jsonl", [f"{name}{n}" for n in range(size)]
    )
    sources[name] = SourceConfig(path=path, weight=weights[name])
  return Prompts(
    DataConfig(
      sources=sources,
      **({"max_prompt_tokens": 12, "overlong": "error"} | options),
    ),
    Letters(),
    Letters(),
    seed=3,
    batch_size=batch_size,
    vocab_size=128,
  )


def texts(prompts, batches):
  return [
    "".join(map(chr, ids[:length]))
    for _ in range(batches)
    for batch in [next(prompts)]
    for ids, length in zip(batch.tokens, batch.lengths, strict=True)
  ]


def source_of(text):
  return text.rstrip("0123456789")


def test_shares_are_the_weights(tmp_path):
  """Exact over a period, and never far from it in between.

  1 : 0.5 : 2.5 is 2 : 1 : 5 of every 8.
  """
  drawn = [source_of(text) for text in texts(make_mixture(tmp_path), 50)]
  counts = collections.Counter(drawn)
  assert counts == {"few": 100, "some": 50, "many": 250}
  running = collections.Counter()
  for number, name in enumerate(drawn, start=1):
    running[name] += 1
    for other, weight in WEIGHTS.items():
      assert abs(running[other] - number * weight / 4) < 2


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_source_has_epochs_of_its_own(tmp_path, shuffle):
  """A source is used up before a row of it comes again, however small."""
  drawn = texts(make_mixture(tmp_path, shuffle=shuffle), 50)
  for name, size in SIZES.items():
    mine = [text for text in drawn if source_of(text) == name]
    whole = [
      tuple(mine[i : i + size]) for i in range(0, len(mine) - size + 1, size)
    ]
    assert len(whole) >= 5
    assert all(len(set(epoch)) == size for epoch in whole)
    in_order = tuple(f"{name}{n}" for n in range(size))
    if shuffle:
      # 5 rows have 120 orders: two of 20 epochs may be alike.
      assert len(set(whole)) > len(whole) / 2
    else:
      assert set(whole) == {in_order}


def test_sources_of_one_size_are_shuffled_each_in_its_own_way(tmp_path):
  sources = {
    name: SourceConfig(
      path=write_rows(
        tmp_path / f"{name}.jsonl", [f"{name}{n}" for n in range(9)]
      )
    )
    for name in "ab"
  }
  prompts = Prompts(
    DataConfig(sources=sources),
    Letters(),
    seed=0,
    batch_size=18,
    vocab_size=128,
  )
  drawn = texts(prompts, 1)
  orders = [[t[1:] for t in drawn if t[0] == name] for name in "ab"]
  assert sorted(orders[0]) == sorted(orders[1])
  assert orders[0] != orders[1]


def test_a_mixture_resumes(tmp_path):
  whole = make_mixture(tmp_path)
  expected = texts(whole, 12)
  for stop in (0, 1, 7):
    first = make_mixture(tmp_path)
    texts(first, stop)
    state = json.loads(json.dumps(first.get_state()))
    second = make_mixture(tmp_path)
    texts(second, 2)
    second.set_state(state)
    assert texts(second, 12 - stop) == expected[stop * 8 :]


def test_each_source_is_reported(tmp_path):
  prompts = make_mixture(
    tmp_path, overlong="truncate_left", max_prompt_tokens=5
  )
  kept = {name: report.kept for name, report in prompts.reports.items()}
  assert kept == SIZES
  truncated = {name: r.truncated for name, r in prompts.reports.items()}
  # From "many10" on.
  assert truncated == {"few": 0, "some": 0, "many": 30}
  total = prompts.report
  assert (total.rows, total.kept, total.truncated) == (55, 55, 30)
  assert total.longest == 6
  lengths = [4] * 5 + [5] * 10 + [5] * 40
  assert total.mean_length == pytest.approx(sum(lengths) / 55)
  examples = prompts.examples(1)
  assert [e.source for e in examples] == ["few", "some", "many"]
  assert [e.index for e in examples] == [0, 0, 0]


def test_a_source_without_a_row_is_an_error(tmp_path):
  with pytest.raises(InputError, match=r"none of the 5 rows of source 'few'"):
    make_mixture(tmp_path, overlong="drop", max_prompt_tokens=3)


def test_the_teacher_reads_the_students_ids_where_nothing_else_is_said(
  tmp_path,
):
  plain = write_rows(tmp_path / "plain.jsonl", ["ab", "cd"])
  shown = write_rows(tmp_path / "shown.jsonl", ["xy"])
  prompts = Prompts(
    DataConfig(
      sources={
        "plain": SourceConfig(path=plain),
        "shown": SourceConfig(
          path=shown, teacher_prompt=TemplateConfig(text="{text}!")
        ),
      },
      shuffle=False,
    ),
    Letters(),
    Letters(),
    seed=0,
    batch_size=4,
    vocab_size=128,
  )
  batch = next(prompts)
  assert batch.teacher is not None
  assert batch.teacher.tokens.shape == (4, 3)
  found = {}
  for row, ids, length in zip(
    batch.rows, batch.teacher.tokens, batch.teacher.lengths, strict=True
  ):
    found[row] = "".join(map(chr, ids[:length]))
  assert found == {0: "ab", 1: "cd", 2: "xy!"}
