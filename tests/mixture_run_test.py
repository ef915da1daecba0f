"""Runs on a mixture whose teacher reads prompts of its own."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from opd_jax import cli
from opd_jax.config import RunConfig
from opd_jax.data import tfds
from opd_jax.parsing import parse
from opd_jax.setup import make_step, prepare
from opd_jax.train import describe, train
from tests import pair
from tests.data.letters import write_rows

BATCH = {"batch": {"prompts": 8}, "checkpoint": {"every": 2}}
CHAT = (
  "{{ bos_token }}{% for m in messages %}"
  "{{ m['role'][0] }}. {{ m['content'] }} {% endfor %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A pair, a chat template of the teacher, and three kinds of sources."""
  folder = pair.write_pair(tmp_path_factory.mktemp("pair"))
  (folder / "teacher" / "chat_template.jinja").write_text(CHAT)
  rows = [{"word": letter * 3, "hint": letter} for letter in "abcdefg"]
  jsonl = write_rows(folder / "words.jsonl", rows)
  tfds.build(jsonl, "words", folder / "datasets")
  pq.write_table(pa.Table.from_pylist(rows[:3]), folder / "few.parquet")
  return folder


def config_of(folder, **changes):
  values = pair.config_of(folder, held_out={}, **changes)
  plain = {"text": "{word}"}
  hinted = {"text": "{hint}, {word}", "chat": True}
  values["data"] = {
    "sources": {
      "texts": {"path": f"{folder}/texts.jsonl", "weight": 2.0},
      "words": {
        "path": "tfds:words",
        "options": {"data_dir": f"{folder}/datasets"},
        "prompt": plain,
        "teacher_prompt": hinted,
      },
      "few": {"path": f"{folder}/few.parquet", "prompt": plain},
    },
    "max_prompt_tokens": 24,
    "overlong": "error",
  }
  return values


def losses(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  records = [json.loads(line) for line in lines]
  return {r["step"]: r["train/loss"] for r in records if "train/loss" in r}


def test_a_run_says_what_it_reads(folder):
  setup = prepare(parse(RunConfig, config_of(folder, batch={"prompts": 8})))
  # Of source texts, where it reads what the student reads: <s> and 17 letters.
  assert setup.prompts.teacher_window == 18
  (lines,) = ["\n".join(describe(setup, make_step(setup)))]
  for part in (
    "texts, words, few: 20 of 20 rows",
    "  texts: 10 of 10 rows, weight 2\n",
    "  few: 3 of 3 rows, weight 1\n",
    "the teacher reads prompts of its own, the longest 18 tokens\n",
  ):
    assert part in lines


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
  """The folder of a run of 4 steps."""
  workdir = tmp_path_factory.mktemp("whole")
  train(parse(RunConfig, config_of(folder, steps=4, **BATCH)), workdir)
  return workdir


def test_a_stopped_run_goes_on_with_the_same_prompts(folder, whole, tmp_path):
  """More steps are the same run: 2 and 2 more are 4 at once."""
  for steps in (2, 4):
    train(parse(RunConfig, config_of(folder, steps=steps, **BATCH)), tmp_path)
  assert losses(tmp_path) == losses(whole)
  assert len(losses(whole)) == 4
  one, two = (
    load_file(workdir / "export" / "model.safetensors")
    for workdir in (whole, tmp_path)
  )
  for name, value in one.items():
    np.testing.assert_array_equal(value, two[name])


def test_what_the_teacher_reads_changes_the_loss(folder, whole, tmp_path):
  values = config_of(folder, steps=1, **BATCH)
  values["data"]["sources"]["words"]["teacher_prompt"] = None
  train(parse(RunConfig, values), tmp_path)
  assert abs(losses(tmp_path)[1] - losses(whole)[1]) > 1e-3


def test_the_teachers_window(folder, tmp_path, capsys):
  """As long as its longest prompt, and checked against its positions."""
  values = config_of(folder, sampling={"max_new_tokens": 48})
  values["data"]["overlong"] = "truncate_left"
  source = values["data"]["sources"]["words"]
  source["teacher_prompt"] = {"text": "so " * 20}
  values["data"]["max_prompt_tokens"] = 16
  # Both windows are full: 16 + 48 = 64 positions.
  assert prepare(parse(RunConfig, values)).prompts.teacher_window == 16
  values["data"]["max_prompt_tokens"] = 17
  text = f"def get_config():\n  return {values!r}\n"
  (tmp_path / "config.py").write_text(text)
  config = f"--config={tmp_path}/config.py"
  assert cli.main(["train", config, f"--workdir={tmp_path}/out"]) == 2
  line = capsys.readouterr().err.splitlines()[-1]
  assert "17 + 48 = 65" in line
  assert "window of 64" in line
