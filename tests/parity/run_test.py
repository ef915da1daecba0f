"""The shipped config on the real pair: what it exports, transformers loads."""

import json

import jax
import numpy as np
import pytest

from opd_jax import cli, parsing
from opd_jax import setup as setup_lib
from opd_jax.config import RunConfig
from opd_jax.models import Model, hf
from opd_jax.sharding import TRAIN_RULES, Layout, make_mesh
from opd_jax.train import train

torch = pytest.importorskip("torch", reason="torch is not installed")
pytestmark = pytest.mark.parity

PROMPT = "Once upon a time, there was a little"


def test_export_of_the_real_student(shared_data, monkeypatch, tmp_path):
  from transformers import AutoModelForCausalLM, AutoTokenizer

  monkeypatch.setattr(
    setup_lib, "make_mesh", lambda sizes: make_mesh({}, jax.devices()[:1])
  )
  config = parsing.load(
    RunConfig,
    f"configs/tinystories_babyllama.py:{shared_data}",
    ["steps=3", "log.time_split_every=None", "optimizer.warmup_steps=0"],
  )
  summary = train(config, tmp_path)
  # The loss that transformers gives the pair in its reference.json.
  source = shared_data / "models" / "babyllama-student"
  np.testing.assert_allclose(summary.before["held_out/loss"], 1.894, atol=5e-4)
  assert summary.after["held_out/loss"] < summary.before["held_out/loss"]

  theirs = AutoModelForCausalLM.from_pretrained(
    summary.export, dtype=torch.float32
  ).eval()
  tokenizer = AutoTokenizer.from_pretrained(summary.export)
  ids = tokenizer(PROMPT)["input_ids"]
  model = Model(
    hf.read_config(summary.export),
    Layout.create(make_mesh({}, jax.devices()[:1]), TRAIN_RULES),
  )
  params = hf.load(summary.export, model)
  tokens = np.array([ids], np.int32)
  positions = np.arange(len(ids), dtype=np.int32)[None]
  ours = model.logits(params, model.hidden(params, tokens, positions))
  with torch.no_grad():
    expected = theirs(torch.tensor([ids])).logits.numpy()
  np.testing.assert_allclose(
    ours[..., : expected.shape[-1]], expected, atol=1e-4
  )
  # It is the trained student, not the one it started from.
  start = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
  with torch.no_grad():
    before = start(torch.tensor([ids])).logits.numpy()
  assert np.max(np.abs(before - expected)) > 0.1

  written = tmp_path / "completion.json"
  command = ["generate", f"--model={summary.export}", f"--prompt={PROMPT}"]
  command += ["--max_new_tokens=40", "--temperature=0", f"--json={written}"]
  assert cli.main(command) == 0
  (completion,) = json.loads(written.read_text())
  with torch.no_grad():
    drawn = theirs.generate(
      torch.tensor([ids]), max_new_tokens=40, do_sample=False, pad_token_id=0
    )[0].tolist()
  assert completion["tokens"] == drawn[len(ids) :]
  assert PROMPT + completion["text"] == tokenizer.decode(
    drawn, skip_special_tokens=True
  )
  generation = json.loads((source / "generation_config.json").read_text())
  carried = json.loads(
    (tmp_path / "export" / "generation_config.json").read_text()
  )
  assert carried == generation
