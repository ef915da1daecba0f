"""GSM8K prompts of the Qwen2.5 chat template, from files and a dataset."""

import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opd_jax import tokenizer
from opd_jax.config import DataConfig, SourceConfig, TemplateConfig
from opd_jax.data import tfds
from opd_jax.data.prompts import Prompts
from tests import pair
from tests.conftest import REPO

CHAT = TemplateConfig(text="{question}", chat=True, system="Think first.")

TEMPLATE = (
  "{% for m in messages %}{{ m.content }}"
  "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
)

# A whole run: prompts, sampling, scoring, update, checkpoint, export, records.
SCRIPT = """
import json, sys
from opd_jax.config import RunConfig
from opd_jax.parsing import parse
from opd_jax.train import train

train(parse(RunConfig, json.loads(sys.argv[1])), sys.argv[2])
print([name for name in ("tensorflow", "torch") if name in sys.modules])
"""


@pytest.fixture(scope="module")
def sources(shared_data, tmp_path_factory):
  """The questions of GSM8K as JSONL, Parquet and a TensorFlow Dataset."""
  folder = tmp_path_factory.mktemp("gsm8k")
  jsonl = shared_data / "gsm8k" / "test.jsonl"
  rows = [json.loads(line) for line in jsonl.read_bytes().splitlines()]
  pq.write_table(pa.Table.from_pylist(rows), folder / "test.parquet")
  tfds.build(jsonl, "gsm8k", folder, "test")
  options = {"data_dir": str(folder)}
  return {
    "jsonl": SourceConfig(path=str(jsonl), prompt=CHAT),
    "parquet": SourceConfig(path=str(folder / "test.parquet"), prompt=CHAT),
    "tfds": SourceConfig(
      path="tfds:gsm8k", split="test", options=options, prompt=CHAT
    ),
  }


def test_every_kind_of_source_gives_the_same_prompts(sources, shared_data):
  """The same ids in the same order, over more than an epoch."""
  qwen = tokenizer.load(shared_data / "tokenizers" / "qwen2.5")
  made = {
    kind: Prompts(
      DataConfig(sources={"gsm8k": source}, overlong="error"),
      qwen,
      seed=11,
      batch_size=200,
      vocab_size=qwen.id_count,
    )
    for kind, source in sources.items()
  }
  first = made["jsonl"]
  assert (first.report.rows, first.report.kept) == (1319, 1319)
  assert len({p.get_state()["prompts"] for p in made.values()}) == 1
  for _ in range(8):
    batches = [next(prompts) for prompts in made.values()]
    assert len({batch.rows for batch in batches}) == 1
    for batch in batches[1:]:
      np.testing.assert_array_equal(batch.tokens, batches[0].tokens)
      np.testing.assert_array_equal(batch.lengths, batches[0].lengths)
  # And they are what transformers makes of the messages by itself.
  row = json.loads(
    (shared_data / "gsm8k" / "test.jsonl").read_bytes().splitlines()[0]
  )
  from transformers import AutoTokenizer

  theirs = AutoTokenizer.from_pretrained(
    shared_data / "tokenizers" / "qwen2.5"
  ).apply_chat_template(
    [
      {"role": "system", "content": "Think first."},
      {"role": "user", "content": row["question"]},
    ],
    add_generation_prompt=True,
    return_dict=False,
  )
  assert list(first.examples(1)[0].student.ids) == theirs


def test_training_imports_neither_tensorflow_nor_torch(sources, tmp_path):
  """A run of one step on every kind of source, in a process of its own."""
  folder = pair.write_pair(tmp_path)
  for role in ("student", "teacher"):
    file = folder / role / "tokenizer_config.json"
    values = {**json.loads(file.read_text()), "chat_template": TEMPLATE}
    file.write_text(json.dumps(values))
  values = pair.config_of(
    folder,
    data={
      "sources": {
        kind: {
          "path": source.path,
          "split": source.split,
          "options": dict(source.options),
          "rows": 3,
          "prompt": {"text": "{question}", "chat": True},
        }
        for kind, source in sources.items()
      },
      "max_prompt_tokens": 40,
    },
    steps=1,
  )
  workdir = tmp_path / "run"
  result = subprocess.run(
    [sys.executable, "-c", SCRIPT, json.dumps(values), str(workdir)],
    capture_output=True,
    text=True,
    cwd=REPO,
    # One device.
    env={**os.environ, "XLA_FLAGS": ""},
  )
  assert result.returncode == 0, result.stderr
  assert (workdir / "export" / "model.safetensors").is_file()
  assert result.stdout.splitlines()[-1] == "[]"
