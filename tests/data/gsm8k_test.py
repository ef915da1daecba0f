"""GSM8K prompts of the Qwen2.5 chat template, from files and a dataset."""

import json
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
from tests.conftest import REPO

CHAT = TemplateConfig(text="{question}", chat=True, system="Think first.")

# What training imports, and prompts read of every kind of source.
SCRIPT = """
import json, sys
import opd_jax.train
from opd_jax.metrics import Writer
from opd_jax import tokenizer
from opd_jax.config import DataConfig, SourceConfig, TemplateConfig
from opd_jax.data.prompts import Prompts

paths, dataset, folder = json.loads(sys.argv[1])
chat = TemplateConfig(text="{question}", chat=True)
sources = {
  path: SourceConfig(
    path=path, prompt=chat, rows=3, **(dataset if "tfds" in path else {})
  )
  for path in paths
}
qwen = tokenizer.load(folder)
prompts = Prompts(
  DataConfig(sources=sources),
  qwen,
  seed=0,
  batch_size=2,
  vocab_size=qwen.id_count,
)
next(prompts)
writer = Writer(sys.argv[2])
writer.metrics(1, {"train/loss": 0.5})
writer.close()
assert prompts.report.kept == 9
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


def test_training_imports_neither_tensorflow_nor_torch(
  sources, shared_data, tmp_path
):
  """In a process of its own, where torch may be installed."""
  paths = [source.path for source in sources.values()]
  folder = str(shared_data / "tokenizers" / "qwen2.5")
  dataset = {"split": "test", "options": sources["tfds"].options}
  result = subprocess.run(
    [
      sys.executable,
      "-c",
      SCRIPT,
      json.dumps([paths, dataset, folder]),
      str(tmp_path),
    ],
    capture_output=True,
    text=True,
    cwd=REPO,
  )
  assert result.returncode == 0, result.stderr
  assert result.stdout == "[]\n"
