"""Evaluation rows that the student is trained on."""

import json

import jax
import pytest

from opd_jax import preflight, setup
from opd_jax.config import RunConfig, SftConfig
from opd_jax.data import sources
from opd_jax.data.files import read_jsonl
from opd_jax.parsing import parse
from opd_jax.preflight.data import overlaps
from opd_jax.sharding import make_mesh
from tests import pair
from tests.preflight.support import config_of, inspect, only


def _write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def _messages(*said):
  roles = {"s": "system", "u": "user", "a": "assistant"}
  return {
    "messages": [{"role": roles[text[0]], "content": text[2:]} for text in said]
  }


def test_evaluation_rows_in_the_training_data(folder):
  rows = [
    {"question": "New?", "answer": "1"},
    {"question": "  BB is\n a letter. ", "answer": "2"},
    {"question": "z is a letter.", "answer": "3"},
  ]
  file = folder / "problems.jsonl"
  file.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
  source = {"path": str(file), "prompt": {"text": "Q: {question} A:"}}
  report = inspect(config_of(folder, eval={"source": source}))
  only(
    report,
    "eval_rows_in_training",
    "1 of 3 rows of eval.source",
    "problems.jsonl, line 2 is ",
    "texts.jsonl, line 2: 'q: bb is a letter. a:'",
    "take them out of one of the two",
  )
  held_out = {"path": str(folder / "texts.jsonl"), "rows": 4}
  only(
    inspect(config_of(folder, held_out=held_out)),
    "eval_rows_in_training",
    "4 of 4 rows of held_out are",
    "line 1 is ",
  )


CHAT = {"chat": True, "messages": "messages"}
LETTERS = {"chat": True, "text": "{question}", "system": "Be brief."}


@pytest.mark.parametrize(
  ("trained", "prompt", "asked", "eval_prompt", "count"),
  [
    # A system message on one side, none on the other.
    (
      [_messages("s:Be brief.", "u:What is B?")],
      CHAT,
      [{"question": "what is b?"}, {"question": "What is C?"}],
      LETTERS,
      1,
    ),
    (
      [{"question": "What is B?"}],
      LETTERS,
      [_messages("u:What is B?"), _messages("u:What is C?")],
      CHAT,
      1,
    ),
    # A later message of a conversation; its answers are nobody's question.
    (
      [_messages("u:Hello.", "a:What is C?", "u:What is B?")],
      CHAT,
      [{"question": "What is B?"}, {"question": "What is C?"}],
      LETTERS,
      1,
    ),
    # Everybody says "Go on." at times: that is not the same conversation.
    (
      [_messages("u:What is B?", "a:B.", "u:Go on.")],
      CHAT,
      [_messages("u:What is C?", "a:C.", "u:Go on.")],
      CHAT,
      0,
    ),
    # No message of the user at all.
    ([_messages("s:One.")], CHAT, [_messages("s:Two.")], CHAT, 0),
  ],
)
def test_messages_are_compared_by_what_the_user_says(
  tmp_path, trained, prompt, asked, eval_prompt, count
):
  trained = _write(tmp_path / "trained.jsonl", trained)
  asked = _write(tmp_path / "asked.jsonl", asked)
  values = pair.config_of(
    tmp_path,
    data={"sources": {"texts": {"path": trained, "prompt": prompt}}},
    eval={"source": {"path": asked, "prompt": eval_prompt}},
    held_out={},
  )
  (found,) = overlaps(parse(RunConfig, values))
  assert found.count == count


@pytest.mark.parametrize(
  ("text", "count"),
  [
    ("{question}", 2),
    ("{answer}", 1),
    ("{question}{answer}", 1),
    ("Q: {question} A: {answer}", 1),
    ("Q: {question}", 2),
  ],
)
def test_fine_tuning_learns_completions_too(tmp_path, text, count):
  """Of three held-out rows one is learned, of another the question alone."""
  pair.write_examples(tmp_path)
  rows = [
    {"question": "bb", "answer": "b."},
    {"question": "ccc", "answer": "zz."},
    {"question": "y", "answer": "y."},
  ]
  held_out = {"path": _write(tmp_path / "own.jsonl", rows), "text": text}
  values = pair.sft_config_of(tmp_path, held_out=held_out)
  (found,) = overlaps(parse(SftConfig, values))
  assert (found.key, found.rows, found.count) == ("held_out", 3, count)


def test_an_inspection_reads_a_source_once(folder, monkeypatch):
  eval_source = {"path": str(folder / "held_out.jsonl"), "answer": "{text}"}
  config = config_of(
    folder,
    eval={"source": eval_source, "verifier": "exact"},
    held_out={},
  )
  prepared = setup.prepare(config)
  step = setup.make_step(prepared, make_mesh({}, jax.devices()[:1]))
  read = []

  def counted(path):
    read.append(path)
    return read_jsonl(path)

  monkeypatch.setitem(sources.FILES, ".jsonl", counted)
  preflight.inspect(prepared, step, with_probe=True)
  assert sorted(read) == [
    str(folder / "held_out.jsonl"),
    str(folder / "texts.jsonl"),
  ]
