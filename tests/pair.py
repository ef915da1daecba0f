"""A tiny student and teacher as Hugging Face folders, with a tokenizer."""

import json
import string

import jax
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from opd_jax.export import export
from opd_jax.models import Model, ModelConfig
from opd_jax.sharding import TRAIN_RULES, Layout, make_mesh

SPECIAL = ("<unk>", "<s>", "</s>")
WINDOW = 64


def write_tokenizer(folder, characters=string.ascii_lowercase + " .,"):
  """One id per character; `<s>` is put in front of every text."""
  tokens = (*SPECIAL, *characters)
  tokenizer = Tokenizer(
    models.WordLevel(
      {token: index for index, token in enumerate(tokens)}, "<unk>"
    )
  )
  tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
  tokenizer.post_processor = processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", 1)]
  )
  tokenizer.save(str(folder / "tokenizer.json"))
  special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
  (folder / "tokenizer_config.json").write_text(
    json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special})
  )
  (folder / "generation_config.json").write_text(
    json.dumps({"bos_token_id": 1, "eos_token_id": [2, 5]})
  )
  return len(tokens)


def write_model(folder, *, layers, seed, vocab_size, width=16):
  """Random weights large enough that rows differ from each other."""
  config = ModelConfig.from_hf(
    {
      "model_type": "llama",
      "vocab_size": vocab_size,
      "hidden_size": width,
      "intermediate_size": 24,
      "num_hidden_layers": layers,
      "num_attention_heads": 4,
      "num_key_value_heads": 2,
      "max_position_embeddings": WINDOW,
      "tie_word_embeddings": True,
    }
  )
  mesh = make_mesh({}, jax.devices()[:1])
  model = Model(config, Layout.create(mesh, TRAIN_RULES))
  params = jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf if path[-1].key == "scale" else 8.0 * leaf,
    model.init(jax.random.key(seed)),
  )
  export(params, model, None, folder)


def write_pair(folder):
  """Writes `student/`, `teacher/`, `texts.jsonl` and `held_out.jsonl`."""
  for role, layers, seed in (("student", 2, 0), ("teacher", 3, 1)):
    vocab_size = len(SPECIAL) + len(string.ascii_lowercase) + 3
    write_model(folder / role, layers=layers, seed=seed, vocab_size=vocab_size)
    write_tokenizer(folder / role)
  for name, letters in (("texts", "abcdefghij"), ("held_out", "klmnopqrst")):
    rows = [
      {"text": f"{letter * (index % 4 + 1)} is a letter."}
      for index, letter in enumerate(letters)
    ]
    lines = [json.dumps(row) for row in rows]
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
  return folder


def config_of(folder, **changes):
  """The values of a run on such a folder; `changes` replace whole groups."""
  return {
    "student": {"path": str(folder / "student")},
    "teacher": {"path": str(folder / "teacher")},
    "data": {
      "sources": {"texts": {"path": str(folder / "texts.jsonl")}},
      "max_prompt_tokens": 8,
    },
    "sampling": {"max_new_tokens": 6},
    "batch": {"prompts": 4, "rollouts": 2, "chunk_tokens": 16},
    "objective": {"name": "gkd"},
    "optimizer": {"learning_rate": 1e-3},
    "held_out": {
      "path": str(folder / "held_out.jsonl"),
      "every": 2,
      "batch": 4,
    },
    "checkpoint": {"every": 3},
    "log": {"every": 1, "sample_every": 1, "time_split_every": None},
    "steps": 6,
    **changes,
  }


def write_examples(folder):
  """Writes `examples.jsonl`, 13 questions and answers, beside a pair."""
  rows = [
    {"question": letter * (index % 3 + 1), "answer": f"{letter}."}
    for index, letter in enumerate("abcdefghijklm")
  ]
  (folder / "examples.jsonl").write_text(
    "".join(json.dumps(row) + "\n" for row in rows)
  )
  return folder


def sft_config_of(folder, **changes):
  """The values of a fine-tuning; `changes` replace whole groups."""
  return {
    "student": {"path": str(folder / "student")},
    "data": {
      "sources": {
        "letters": {
          "path": str(folder / "examples.jsonl"),
          "prompt": {"text": "{question}"},
          "completion": "{answer}",
        }
      }
    },
    "batch": {"rows": 2, "row_tokens": 16, "chunk_tokens": 16},
    "optimizer": {"learning_rate": 1e-2},
    "held_out": {"path": str(folder / "texts.jsonl"), "every": 2, "batch": 4},
    "checkpoint": {"every": 3},
    "log": {"every": 1, "sample_every": 1},
    "steps": 8,
    **changes,
  }
