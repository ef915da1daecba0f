"""Pairs that are wrong in one way each, and a good one.

Every finding must name what was found and what to do about it.
"""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from opd_jax import cli, memory, preflight, setup, train
from opd_jax.config import RunConfig
from opd_jax.errors import InputError
from opd_jax.models import ModelConfig, hf
from opd_jax.parsing import parse
from opd_jax.sharding import make_mesh
from tests import pair

REPO = pathlib.Path(__file__).resolve().parent.parent
EMBEDDING = "model.embed_tokens.weight"
# A turn ends with </s>; `enable_thinking` false puts an empty thinking part.
CHAT = (
  "{% for m in messages %}{{ m.content }}"
  "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
  "{% if add_generation_prompt and enable_thinking is defined and "
  "not enable_thinking %}<think> </think>{% endif %}"
)


@pytest.fixture(scope="session")
def good(tmp_path_factory):
  return pair.write_pair(tmp_path_factory.mktemp("good"))


@pytest.fixture
def folder(good, tmp_path):
  """A pair to damage."""
  return shutil.copytree(good, tmp_path / "pair")


def config_of(folder, prompt=None, teacher_prompt=None, **changes):
  texts = {"path": str(folder / "texts.jsonl"), "prompt": prompt or {}}
  texts["teacher_prompt"] = teacher_prompt
  data = {"sources": {"texts": texts}, "max_prompt_tokens": 40}
  sampling = {"max_new_tokens": 6, **changes.pop("sampling", {})}
  changes = {"data": data, "sampling": sampling, **changes}
  values = pair.config_of(folder, **changes)
  return parse(RunConfig, values)


def inspect(config, with_probe=False):
  prepared = setup.prepare(config)
  step = setup.make_step(prepared, make_mesh({}, jax.devices()[:1]))
  return preflight.inspect(prepared, step, with_probe=with_probe)


def messages(report):
  """Of the findings, by name."""
  return {found.name: found.message for found in report.findings}


def only(report, name, *words):
  """The report has this finding and no other, and its message these words."""
  found = messages(report)
  assert list(found) == [name]
  missing = [word for word in words if word not in found[name]]
  assert not missing, found[name]


def change_json(path, **values):
  content = json.loads(path.read_text())
  path.write_text(json.dumps({**content, **values}))


def change_embedding(folder, change):
  file = folder / "student" / "model.safetensors"
  tensors = load_file(file)
  tensors[EMBEDDING] = np.ascontiguousarray(change(tensors[EMBEDDING]))
  save_file(tensors, file)


def set_chat(folder, template, roles=("student", "teacher")):
  for role in roles:
    change_json(folder / role / "tokenizer_config.json", chat_template=template)


def test_a_good_pair_has_no_findings(good):
  report = inspect(config_of(good))
  assert not report.findings
  report.enforce()
  text = "\n".join(report.lines())
  assert text.endswith("findings\n  nothing found")
  for words in (
    "rows of the model     32               32",
    "a completion ends at 2 '</s>', 5 'c'",
    "texts   100.0 %  10    10",
    "held_out: 0 of 10 rows",
    # The last of "a is a letter." behind <s>.
    "14        30 '.'        14        30 '.'        prompt",
  ):
    assert words in text, words
  figures = json.loads(json.dumps(report.figures()))
  assert figures["findings"] == []
  assert figures["vocabulary"]["stop_ids"] == [2, 5]
  assert figures["memory"]["resident_bytes"] > 0


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


def test_train_stops_before_it_loads_a_weight(folder, tmp_path, monkeypatch):
  def load(*arguments, **options):
    pytest.fail("loaded weights")

  monkeypatch.setattr(hf, "load", load)
  text = {"text": "<s>{text}"}
  with pytest.raises(InputError, match=r"1 error: bos_doubled: .*preflight.al"):
    train.train(
      config_of(folder, prompt=text, batch={"prompts": 8}), tmp_path / "run"
    )
  assert not (tmp_path / "run").exists()


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


def test_a_bos_that_is_there_twice(folder):
  only(
    inspect(config_of(folder, prompt={"text": "<s>{text}"})),
    "bos_doubled",
    "the student's prompt",
    "1 '<s>' twice (ids [1, 1, 3, ",
    "data.sources.texts.prompt",
  )


def test_a_bos_in_one_template_only(folder):
  set_chat(folder, CHAT)
  # A plain prompt gets a bos by the tokenizer, the chat template has none.
  report = inspect(config_of(folder, prompt={}, teacher_prompt={"chat": True}))
  only(
    report,
    "bos_differs",
    "only the student's prompt",
    "[1, 3, 29, 11] (student), [3, 29, 11, 21] (teacher",
    "data.sources.texts.teacher_prompt",
    "mend the chat template",
  )
  # The same where the teacher reads the student's ids.
  set_chat(folder, "<s>" + CHAT, roles=["teacher"])
  report = inspect(config_of(folder, prompt={"chat": True}))
  found = messages(report)
  assert list(found) == ["bos_differs", "chat_templates_differ"]
  assert "only the teacher's prompt" in found["bos_differs"]
  assert "from character 0 on" in found["chat_templates_differ"]
  assert "'<s>a is a letter.'" in found["chat_templates_differ"]


def test_another_thinking_switch(folder):
  set_chat(folder, CHAT)
  report = inspect(
    config_of(
      folder,
      prompt={"chat": True, "thinking": True},
      teacher_prompt={"chat": True, "thinking": False},
    )
  )
  only(
    report,
    "thinking_differs",
    "prompt.thinking = True",
    "teacher_prompt.thinking = False",
    "'a is a letter.<think> </think>'",
    "set both to the same value",
  )
  text = "\n".join(report.lines())
  assert "first difference in the ids, at 14: the end / 0 '<unk>'" in text
  # None is the template's default, which here is True.
  same = config_of(
    folder,
    prompt={"chat": True, "thinking": True},
    teacher_prompt={"chat": True},
  )
  assert not inspect(same).findings


def test_a_teacher_whose_template_thinks(folder):
  set_chat(folder, CHAT)
  set_chat(folder, CHAT + "<think>", roles=["teacher"])
  found = messages(inspect(config_of(folder, prompt={"chat": True})))
  assert list(found) == ["thinking_differs", "chat_templates_differ"]
  assert "teacher_prompt = None" in found["thinking_differs"]
  assert "'a is a letter.<think>'" in found["thinking_differs"]


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


def test_chat_prompts_that_lose_their_beginning(folder):
  set_chat(folder, CHAT)
  config = config_of(
    folder,
    data={
      "sources": {
        "texts": {"path": f"{folder}/texts.jsonl", "prompt": {"chat": True}}
      },
      "max_prompt_tokens": 15,
    },
  )
  # "aaaa is a letter." has 17 characters, "aaa is" ... 16.
  only(
    inspect(config),
    "chat_prompts_truncated",
    "4 of 10 prompts of data.sources.texts",
    "max_prompt_tokens = 15 (the student's longest has 17)",
    'data.overlong to "drop"',
  )


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


def test_memory_against_what_a_device_offers(good, monkeypatch):
  config = config_of(good)
  found = inspect(config).figures()["memory"]
  resident, total = found["resident_bytes"], found["total_bytes"]
  for limit, name, words in (
    (total, None, ()),
    (total - 1, "memory_tight", ("batch.micro_batches", "student.remat")),
    (resident - 1, "memory_exceeded", ("mesh.fsdp", "more devices")),
  ):
    monkeypatch.setattr(memory, "device_limit", lambda limit=limit: limit)
    report = inspect(config)
    if name is None:
      assert not report.findings
    else:
      size = preflight.device.size_text(limit)
      only(report, name, f"offers {size}", *words)


def test_an_unknown_name_to_allow(good):
  with pytest.raises(
    InputError, match=r"'bos_double'.*mean 'bos_doubled'.*eos"
  ):
    inspect(config_of(good, preflight={"allow": ("bos_double",)}))


def test_the_probe_measures_the_stop_ids(folder):
  # All ids alike: 2 of 32 stop, whatever came before.
  change_embedding(folder, lambda rows: np.full_like(rows, 0.5))
  config = config_of(folder, sampling={"max_new_tokens": 24})
  report = inspect(config, with_probe=True)
  figures = report.figures()["probe"]
  assert figures["stop_probability"] == pytest.approx(2 / 32, rel=1e-5)
  assert figures["samples"] == 10
  assert 0 < figures["stopped"] <= 10
  assert not report.findings
  assert "completion 0" in "\n".join(report.sections[-1].lines)


def test_a_student_that_never_ends(folder):
  def shy(rows):
    rows *= 50.0
    rows[[2, 5]] = 1e-3
    return rows

  change_embedding(folder, shy)
  config = config_of(folder, sampling={"max_new_tokens": 24})
  only(
    inspect(config, with_probe=True),
    "eos_never_drawn",
    "none of 10 completions of 24 tokens",
    "(2 '</s>', 5 'c')",
    "opd-jax sft",
    "sampling.max_new_tokens = 24",
    "sampling.stop_ids to ()",
  )


def test_cut_completions_leave_it_open(good):
  prepared = setup.prepare(config_of(good))
  ends = preflight.probe.Ends(
    samples=16,
    stopped=0,
    length=256,
    full_length=2048,
    mean_length=256.0,
    stop_probability=1e-3,
  )
  (found,) = preflight.probe.findings(prepared, ends)
  assert found.name == "eos_unclear"
  assert found.severity == "warning"
  assert "sampling.max_new_tokens = 2048" in found.message


CONFIG_FILE = """\
import json
import pathlib


def get_config(folder):
  return json.loads((pathlib.Path(folder) / "config.json").read_text())
"""


def test_the_command(folder, capsys, tmp_path):
  values = pair.config_of(folder, batch={"prompts": 8})
  (folder / "config.py").write_text(CONFIG_FILE)
  (folder / "config.json").write_text(json.dumps(values))
  file = tmp_path / "report.json"
  arguments = [
    "preflight",
    f"--config={folder}/config.py:{folder}",
    "--noprobe",
    f"--json={file}",
  ]
  assert cli.main(arguments) == 0
  out, err = capsys.readouterr()
  assert out.endswith("findings\n  nothing found\n")
  assert not err
  assert json.loads(file.read_text())["findings"] == []
  text = "--config.data.sources.texts.prompt.text=<s>{text}"
  assert cli.main([*arguments, text, "--config.data.max_prompt_tokens=32"]) == 2
  out, err = capsys.readouterr()
  assert "error bos_doubled: the student's prompt" in out
  assert err.startswith("opd-jax: error: preflight found 1 error: bos_doubled")
  assert err.endswith("preflight.allow = ('bos_doubled',))\n")
  (found,) = json.loads(file.read_text())["findings"]
  assert found["name"] == "bos_doubled"
  assert not found["allowed"]


def write_qwen(folder, shared_data, vocab_size):
  """A model of one tiny layer with the real tokenizer of Qwen2.5."""
  shutil.copytree(shared_data / "tokenizers" / "qwen2.5", folder)
  values = {
    "model_type": "qwen2",
    "vocab_size": vocab_size,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
  }
  rng = np.random.default_rng(0)
  tensors = {
    tensor.name: rng.normal(size=tensor.shape).astype(np.float32)
    for tensor in hf.tensors(ModelConfig.from_hf(values))
  }
  save_file(tensors, folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps(values))


def test_the_chat_template_of_qwen(shared_data, tmp_path):
  write_qwen(tmp_path / "student", shared_data, 151_936)
  write_qwen(tmp_path / "teacher", shared_data, 152_064)
  source = {
    "path": str(shared_data / "gsm8k" / "train.jsonl"),
    "rows": 20,
    "prompt": {"chat": True, "text": "{question}"},
    "teacher_prompt": {
      "chat": True,
      "text": "{question}",
      "system": "The answer is {answer}",
    },
  }
  report = inspect(
    config_of(
      tmp_path,
      data={"sources": {"gsm8k": source}, "max_prompt_tokens": 600},
      held_out={},
      eval={
        "source": {
          "path": str(shared_data / "gsm8k" / "test.jsonl"),
          "prompt": {"text": "{question}"},
        }
      },
    )
  )
  assert not report.findings
  figures = report.figures()
  assert figures["vocabulary"]["shared_ids"] == 151_665
  assert figures["vocabulary"]["student_masked_rows"] == 271
  assert figures["vocabulary"]["teacher_masked_rows"] == 399
  text = "\n".join(report.sections[1].lines)
  default = "You are Qwen, created by Alibaba Cloud."
  assert f"| <|im_start|>system\n    | {default}" in text.replace(
    "  |", "    |"
  )
  # Both begin with <|im_start|>, system and a newline: ids 151644, 8948, 198.
  assert "first difference in the ids, at 3: 2610 'You' / 785 'The'" in text
  lines = [line.split() for line in report.sections[1].lines[-6:]]
  shown = [(line[1], line[4], line[6]) for line in lines[:3]]
  assert shown == [
    (str(index), str(index), "prompt") for index in (151644, 77091, 198)
  ]
  ids = figures["prompts"]["examples"][0]
  assert lines[0][0] == str(len(ids["student"]["ids"]) - 3)
  assert lines[0][3] == str(len(ids["teacher"]["ids"]) - 3)


def test_the_page_names_every_finding():
  page = (REPO / "docs" / "preflight.md").read_text()
  missing = [name for name in preflight.KINDS if f"`{name}`" not in page]
  assert not missing
