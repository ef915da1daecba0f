"""A whole run of MiniLLM: mixed draws, passes over mini-batches."""

import json
import signal

import jax
import numpy as np
import pytest

from opd_jax import setup as setup_lib
from opd_jax.config import RunConfig
from opd_jax.parsing import parse
from opd_jax.sharding import make_mesh
from opd_jax.train import train
from tests import pair
from tests.train_test import _arrays, _records, _terminate_after

CHANGES = {
  "objective": {"name": "minillm"},
  "batch": {
    "prompts": 4,
    "rollouts": 2,
    "mini_batches": 2,
    "epochs": 2,
    "chunk_tokens": 16,
  },
  "rollout": {"teacher_mix": 0.2},
  "held_out": {},
  "steps": 3,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Runs the config on one device, in a folder of its own."""
  folder = pair.write_pair(tmp_path_factory.mktemp("pair"))

  def run(workdir, **changes):
    values = pair.config_of(folder, **{**CHANGES, **changes})
    return train(parse(RunConfig, values), workdir)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      setup_lib, "make_mesh", lambda sizes: make_mesh({}, jax.devices()[:1])
    )
    yield run


@pytest.fixture(scope="module")
def uninterrupted(run, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("uninterrupted")
  assert run(workdir).finished
  return workdir


def test_resume_equals_uninterrupted_bit_for_bit(
  run, uninterrupted, monkeypatch, tmp_path
):
  with monkeypatch.context() as patch:
    _terminate_after(patch, 1, signal.SIGTERM)
    assert run(tmp_path).step == 1
  assert run(tmp_path).finished
  assert _records(tmp_path) == _records(uninterrupted)
  for name in ("samples.jsonl", "export/model.safetensors"):
    assert (tmp_path / name).read_bytes() == (uninterrupted / name).read_bytes()
  for found, expected in zip(
    _arrays(tmp_path, 3), _arrays(uninterrupted, 3), strict=True
  ):
    np.testing.assert_array_equal(found, expected)


def test_split_is_fused(run, uninterrupted, tmp_path):
  run(tmp_path, mode="split")
  name = "samples.jsonl"
  assert _records(tmp_path, name) == _records(uninterrupted, name)
  for found, expected in zip(
    _records(tmp_path), _records(uninterrupted), strict=True
  ):
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_steps_are_rollout_batches(uninterrupted):
  records = [
    record for record in _records(uninterrupted) if "train/loss" in record
  ]
  assert [record["step"] for record in records] == [1, 2, 3]
  # A mixture is drawn from: what compares it with the student is left out.
  assert not {"mismatch/mean", "teacher/kl", "drift/kl"} & records[0].keys()
  assert {"objective/weight", "objective/ratio"} <= records[0].keys()
  text = (uninterrupted / "metrics.jsonl").read_text()
  assert all(json.loads(line)["step"] <= 3 for line in text.splitlines())
