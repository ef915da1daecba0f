"""A pair with padded vocabularies trains by default.

As Qwen2.5, whose tokenizer has fewer ids than the 151,936 rows of its small
models and the 152,064 of its large ones: here 32 ids, 48 rows, 40 rows.
"""

import contextlib
import importlib.util
import io
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from opd_jax import cli
from opd_jax import setup as setup_lib
from opd_jax.models import Model, hf
from opd_jax.sharding import TRAIN_RULES, Layout, make_mesh
from tests import pair

IDS, STUDENT_ROWS, TEACHER_ROWS = 32, 48, 40
PROMPT = [1, 5, 7, 9]
# Prints the logits that transformers finds, as JSON.
THEIRS = """\
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
ids = torch.tensor([json.loads(sys.argv[2])])
with torch.no_grad():
  print(json.dumps(model(ids).logits[0].tolist()))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The folder of the pair, the run's folder in it, and what was printed."""
  folder = pair.write_pair(tmp_path_factory.mktemp("padded"))
  for role, rows in (("student", STUDENT_ROWS), ("teacher", TEACHER_ROWS)):
    shutil.rmtree(folder / role)
    pair.write_model(folder / role, layers=2, seed=rows, vocab_size=rows)
    pair.write_tokenizer(folder / role)
  values = pair.config_of(folder, steps=2)
  text = f"def get_config():\n  return {values!r}\n"
  (folder / "config.py").write_text(text)
  printed = io.StringIO()
  with (
    pytest.MonkeyPatch.context() as patch,
    contextlib.redirect_stderr(printed),
  ):
    patch.setattr(
      setup_lib, "make_mesh", lambda sizes: make_mesh({}, jax.devices()[:1])
    )
    command = ["train", f"--config={folder}/config.py"]
    assert cli.main([*command, f"--workdir={folder}/run"]) == 0
  return folder, folder / "run", printed.getvalue()


def test_it_says_what_is_shared(run):
  _, _, printed = run
  line = (
    "vocabulary: 32 shared ids; student has 48, teacher has 40 rows, those "
    "beyond are masked"
  )
  assert line in printed
  assert "preflight: nothing found" in printed


def test_the_masked_mass_of_both_is_logged(run):
  _, workdir, _ = run
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  records = [json.loads(line) for line in lines]
  steps = [record for record in records if "train/loss" in record]
  assert len(steps) == 2
  for record in steps:
    for role in ("student", "teacher"):
      # Rows of random weights are as likely as any other.
      assert 0.01 < record[f"{role}/masked_mass"] < 1
    assert record["mismatch/max"] < 1e-4


def test_the_export_has_the_students_rows(run):
  """Those beyond the shared ids are the ones it came with; the others moved."""
  folder, workdir, _ = run
  config = json.loads((workdir / "export" / "config.json").read_text())
  assert config["vocab_size"] == STUDENT_ROWS
  before, after = (
    load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    for path in (folder / "student", workdir / "export")
  )
  assert after.shape == (STUDENT_ROWS, 16)
  np.testing.assert_array_equal(after[IDS:], before[IDS:])
  assert np.all(np.any(after[:IDS] != before[:IDS], axis=1))


@pytest.mark.parity
@pytest.mark.skipif(
  importlib.util.find_spec("torch") is None, reason="torch is not installed"
)
def test_transformers_loads_it(run):
  """And finds the same logits, in all rows."""
  _, workdir, _ = run
  export = workdir / "export"
  found = subprocess.run(
    [sys.executable, "-c", THEIRS, str(export), json.dumps(PROMPT)],
    capture_output=True,
    text=True,
    check=True,
  )
  theirs = np.array(json.loads(found.stdout), np.float32)
  assert theirs.shape == (len(PROMPT), STUDENT_ROWS)
  layout = Layout.create(make_mesh({}, jax.devices()[:1]), TRAIN_RULES)
  model = Model(hf.read_config(export), layout)
  params = hf.load(export, model)
  tokens = np.array([PROMPT], np.int32)
  positions = np.arange(len(PROMPT), dtype=np.int32)[None]
  ours = model.logits(params, model.hidden(params, tokens, positions))
  np.testing.assert_allclose(
    ours[0, :, :STUDENT_ROWS], theirs, rtol=1e-4, atol=1e-4
  )
