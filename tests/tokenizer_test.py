"""Tokenizers: real ones against known ids, made ones for what must fail."""

import json
import re

import numpy as np
import pytest
import tokenizers

from opd_jax import tokenizer
from opd_jax.errors import InputError

WORDS = ["<s>", "</s>", "<unk>", "red", "green", "blue", "one", "two"]


def save_words(folder, words, *, bos=True, generation_eos=None):
  """A tokenizer of whole words; word i has id i."""
  folder.mkdir()
  ids = {word: index for index, word in enumerate(words)}
  backend = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(ids, unk_token="<unk>")
  )
  backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  if bos:
    backend.post_processor = tokenizers.processors.TemplateProcessing(
      single="<s> $A", special_tokens=[("<s>", ids["<s>"])]
    )
  backend.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(
    json.dumps(
      {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
      }
    )
  )
  if generation_eos is not None:
    (folder / "generation_config.json").write_text(
      json.dumps({"eos_token_id": generation_eos})
    )
  return tokenizer.load(folder)


def test_made_tokenizer_encodes_decodes_and_stops(tmp_path):
  words = save_words(tmp_path / "words", WORDS, generation_eos=[6, 1])
  assert words.encode("red blue two") == [0, 3, 5, 7]
  assert words.decode(np.array([0, 3, 5])) == "red blue"
  assert words.decode([0, 3], skip_special_tokens=False) == "<s> red"
  assert (words.id_count, dict(words.special_ids)["bos"]) == (8, 0)
  assert words.stop_ids == (6, 1)  # generation_config first, eos once.
  assert save_words(tmp_path / "plain", WORDS).stop_ids == (1,)
  one = save_words(tmp_path / "one", WORDS, generation_eos=6)
  assert one.stop_ids == (6, 1)


@pytest.mark.parametrize("name", ["babyllama-student", "stories260K"])
def test_a_completion_keeps_the_space_before_it(name, shared_data):
  tokens = tokenizer.load(shared_data / "models" / name)
  text = "Lily found a big 🙂 box"
  ids = tokens.encode(text)
  added = [tokens.decode_after(ids[:n], ids[n:]) for n in range(1, len(ids))]
  whole = tokens.decode(ids)
  assert all(whole.endswith(rest) for rest in added)
  assert " found a big" in {rest[:12] for rest in added}


def test_real_tokenizer_agrees_with_its_file(shared_data):
  """The ids of a character tokenizer can be read off tokenizer.json."""
  folder = shared_data / "models" / "babyllama-student"
  lines = (shared_data / "tinystories" / "valid.jsonl").read_text().split("\n")
  story = json.loads(lines[0])["text"][:100]
  vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"][
    "vocab"
  ]
  student = tokenizer.load(folder)
  expected = [vocabulary[c.replace(" ", "▁")] for c in " " + story]
  assert student.encode(story) == [1, *expected]
  assert student.decode(student.encode(story)) == story
  assert (student.id_count, student.stop_ids) == (105, (1, 2))
  teacher = tokenizer.load(shared_data / "models" / "babyllama-teacher")
  same = tokenizer.compare(student, teacher)
  assert tokenizer.explain(student, teacher, same) is None
  assert (same.ids, same.special_ids, same.probes) == (0, (), ())


def obstacle(student, teacher):
  """Why the teacher cannot score the student's ids."""
  difference = tokenizer.compare(student, teacher)
  return tokenizer.explain(student, teacher, difference)


def test_real_tokenizers_of_two_families_are_refused(shared_data):
  student = tokenizer.load(shared_data / "tokenizers" / "gpt2")
  teacher = tokenizer.load(shared_data / "tokenizers" / "qwen2.5")
  assert re.search(
    r"differ in 499\d\d of 50257 ids", obstacle(student, teacher)
  )
  assert student.decode(student.encode("Où ?  🙂\n")) == "Où ?  🙂\n"


def test_compare_tells_every_kind_of_difference(tmp_path):
  student = save_words(tmp_path / "student", WORDS)
  swapped = [*WORDS[:3], "green", "red", *WORDS[5:], "three", "four"]
  teacher = save_words(tmp_path / "teacher", swapped)
  found = tokenizer.compare(student, teacher, probes=["blue", "red"])
  assert found.ids == 2
  assert found.examples == ((3, "red", "green"), (4, "green", "red"))
  assert (found.student_extra, found.teacher_extra) == (0, 2)
  assert found.probes == ("red",)
  told = obstacle(student, teacher)
  assert re.search(r"2 of 8 ids.*3: 'red' / 'green'.*fam", told)


def test_extra_rows_are_allowed_but_another_encoding_is_not(tmp_path):
  student = save_words(tmp_path / "student", WORDS)
  larger = save_words(tmp_path / "larger", [*WORDS, "three"])
  assert tokenizer.compare(student, larger).teacher_extra == 1
  assert tokenizer.compare(larger, student).student_extra == 1
  assert obstacle(student, larger) is obstacle(larger, student) is None
  bare = save_words(tmp_path / "bare", WORDS, bos=False)
  assert "same ids but encode" in obstacle(student, bare)


def test_missing_or_broken_files_are_named(tmp_path):
  with pytest.raises(InputError, match=r"no tokenizer in .*nowhere"):
    tokenizer.load(tmp_path / "nowhere")
  broken = tmp_path / "broken"
  broken.mkdir()
  (broken / "tokenizer.json").write_text("{")
  with pytest.raises(InputError, match="cannot read the tokenizer in"):
    tokenizer.load(broken)
  with pytest.raises(InputError, match=r"eos_token_id in .* got 'x'"):
    save_words(tmp_path / "eos", WORDS, generation_eos="x")


@pytest.mark.parametrize(
  ("template", "end"),
  [
    ("{% for m in messages %}{{ m.content }} </s> {% endfor %}", 1),
    ("{% for m in messages %}{{ m.content }} red {% endfor %}", None),
    ("{% for m in messages %}{{ m.content }} stop {% endfor %}", None),
    ("{{ messages[0].content }} </s>", None),
    ("{{ raise_exception('no') }}", None),
  ],
)
def test_end_of_turn_is_the_special_id_behind_an_answer(
  tmp_path, template, end
):
  save_words(tmp_path / "words", WORDS)
  file = tmp_path / "words" / "tokenizer_config.json"
  values = json.loads(file.read_text())
  file.write_text(json.dumps({**values, "chat_template": template}))
  assert tokenizer.load(tmp_path / "words").end_of_turn() == end


def test_end_of_turn_of_real_templates(shared_data):
  qwen = tokenizer.load(shared_data / "tokenizers" / "qwen2.5")
  assert qwen.end_of_turn() == 151645  # <|im_end|>
  gpt2 = tokenizer.load(shared_data / "tokenizers" / "gpt2")
  assert gpt2.end_of_turn() is None
