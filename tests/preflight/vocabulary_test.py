"""Ids that are wrong in one way each: found, told, and what to do."""

import json
import shutil

import pytest

from opd_jax.errors import InputError
from tests import pair
from tests.preflight.support import (
  CHAT,
  change_embedding,
  change_json,
  config_of,
  inspect,
  messages,
  only,
  set_chat,
)


def test_swapped_ids_are_found(folder):
  file = folder / "teacher" / "tokenizer.json"
  content = json.loads(file.read_text())
  ids = content["model"]["vocab"]
  ids["a"], ids["b"] = ids["b"], ids["a"]
  file.write_text(json.dumps(content))
  config = config_of(folder)
  report = inspect(config)
  only(
    report,
    "tokenizers_differ",
    "differ in 2 of 32 ids",
    "3: 'a' / 'b', 4: 'b' / 'a'",
    "they encode 'The quick brown",
    "choose a teacher of the student's tokenizer family",
  )
  with pytest.raises(InputError, match="differ in 2 of 32 ids"):
    report.enforce()
  allowed = config_of(folder, preflight={"allow": ("tokenizers_differ",)})
  report = inspect(allowed)
  report.enforce()
  assert next(report.brief()).startswith("error tokenizers_differ (allowed): ")


def test_more_ids_than_rows(folder):
  for role in ("student", "teacher"):
    pair.write_tokenizer(folder / role, "abcdefghijklmnopqrstuvwxyz .,XY")
  found = inspect(config_of(folder))
  text = messages(found)["tokenizer_exceeds_model"]
  assert "34 ids" in text
  assert "32 rows" in text
  assert "resize" in text
  text = messages(found)["ids_without_teacher"]
  assert "ids 32 to 33" in text
  assert "the first is 'X'" in text


def test_padded_rows_are_told_and_no_finding(folder):
  pair.write_model(folder / "padded", layers=1, seed=1, vocab_size=45)
  for name in ("config.json", "model.safetensors"):
    shutil.copy(folder / "padded" / name, folder / "teacher" / name)
  report = inspect(config_of(folder))
  assert not report.findings
  figures = report.figures()["vocabulary"]
  assert figures["shared_ids"] == 32
  assert (figures["student_masked_rows"], figures["teacher_masked_rows"]) == (
    0,
    13,
  )


def test_stop_ids_of_the_two_and_of_the_config(folder):
  only(
    inspect(config_of(folder, sampling={"stop_ids": (7,)})),
    "stop_ids_unusual",
    "sampling.stop_ids = [7]",
    "2 '</s>', 5 'c'",
    "set it to None",
  )
  change_json(folder / "teacher" / "generation_config.json", eos_token_id=2)
  only(
    inspect(config_of(folder)),
    "stop_ids_differ",
    "the student stops at 2 '</s>', 5 'c', the teacher at 2 '</s>'",
    "sampling.stop_ids",
  )
  for role in ("student", "teacher"):
    (folder / role / "generation_config.json").unlink()
    change_json(folder / role / "tokenizer_config.json", eos_token=None)
  only(
    inspect(config_of(folder)),
    "no_stop_id",
    "every completion has 6 tokens",
    "name one in sampling.stop_ids",
  )
  assert not inspect(config_of(folder, sampling={"stop_ids": ()})).findings


def test_special_ids_of_the_two(folder):
  change_json(folder / "teacher" / "tokenizer_config.json", pad_token="</s>")
  only(inspect(config_of(folder)), "special_ids_differ", "pad None / 2")


def test_a_stop_id_that_was_never_trained(folder):
  def zero_row(rows):
    rows[5] = 0.0
    return rows

  change_embedding(folder, zero_row)
  only(
    inspect(config_of(folder)),
    "stop_row_zero",
    "stop ids 5 'c'",
    "all zeros",
    "opd-jax sft",
  )


def test_an_end_of_turn_that_does_not_stop(folder):
  set_chat(folder, CHAT)
  config = config_of(folder, prompt={"chat": True}, sampling={"stop_ids": (5,)})
  found = messages(inspect(config))
  assert list(found) == ["end_of_turn_not_stop", "stop_ids_unusual"]
  text = found["end_of_turn_not_stop"]
  assert "2 '</s>'" in text
  assert "end at 5 'c'" in text
  assert "add 2 to sampling.stop_ids" in text
  assert not inspect(config_of(folder, prompt={"chat": True})).findings
