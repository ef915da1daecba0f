"""Prompts that are wrong in one way each, and real ones side by side."""

import json
import shutil

import numpy as np
from safetensors.numpy import save_file

from opd_jax.models import ModelConfig, hf
from tests.preflight.support import (
  CHAT,
  config_of,
  inspect,
  messages,
  only,
  set_chat,
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


def test_a_thinking_switch_at_the_front(folder):
  switch = (
    "{% if enable_thinking is defined and not enable_thinking %}no {% endif %}"
  )
  set_chat(folder, switch + "{{ messages[0].content }}")
  report = inspect(
    config_of(
      folder,
      prompt={"chat": True},
      teacher_prompt={"chat": True, "thinking": False},
    )
  )
  only(
    report,
    "thinking_differs",
    "prompt.thinking = None",
    "teacher_prompt.thinking = False",
  )


def test_a_teacher_whose_template_thinks(folder):
  set_chat(folder, CHAT)
  set_chat(folder, CHAT + "<think>", roles=["teacher"])
  found = messages(inspect(config_of(folder, prompt={"chat": True})))
  assert list(found) == ["thinking_differs", "chat_templates_differ"]
  assert "teacher_prompt = None" in found["thinking_differs"]
  assert "'a is a letter.<think>'" in found["thinking_differs"]


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
