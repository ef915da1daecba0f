"""Evaluation rows that the student is trained on."""

import json

from tests.preflight.support import config_of, inspect, only


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
