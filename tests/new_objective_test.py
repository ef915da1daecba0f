"""A new objective is one file and one entry: the rest finds it there."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from opd_jax import cli, objectives
from opd_jax import setup as setup_lib
from opd_jax.sharding import make_mesh
from tests import pair
from tests.objectives import hinge


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = pair.write_pair(tmp_path_factory.mktemp("pair"))
  values = pair.config_of(
    folder,
    objective={"name": "hinge", "margin": 0.5},
    held_out={},
    batch={"prompts": 4, "rollouts": 2, "micro_batches": 2, "chunk_tokens": 16},
    steps=2,
  )
  text = f"def get_config():\n  return {values!r}\n"
  (folder / "config.py").write_text(text)
  return folder


@pytest.fixture
def registered(monkeypatch):
  monkeypatch.setitem(objectives.OBJECTIVES, "hinge", hinge)
  monkeypatch.setattr(
    setup_lib, "make_mesh", lambda sizes: make_mesh({}, jax.devices()[:1])
  )


def _train(folder, workdir, *overrides):
  return cli.main(
    [
      "train",
      f"--config={folder}/config.py",
      f"--workdir={workdir}",
      *(f"--config.objective.{override}" for override in overrides),
    ]
  )


def test_it_trains_by_the_command(folder, registered, tmp_path):
  """Overrides reach its options, terms the log, the gradient the weights."""
  assert _train(folder, tmp_path / "run", "weight=3.0") == 0
  lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  records = [json.loads(line) for line in lines]
  steps = [record for record in records if "train/loss" in record]
  assert len(steps) == 2
  for record in steps:
    # At least 3 times the mean of what is missing, and never below 0.
    assert record["loss/hinge"] == record["train/loss"]
    least = max(0.0, 3.0 * record["objective/missing"])
    assert record["loss/hinge"] >= least - 1e-5
    # On policy, missing = margin - (log student - log teacher).
    np.testing.assert_allclose(
      record["objective/missing"], 0.5 - record["teacher/kl"], atol=1e-5
    )
    assert record["optimizer/grad_norm"] > 0
  before, after = (
    load_file(path / "model.safetensors")
    for path in (folder / "student", tmp_path / "run" / "export")
  )
  assert any(np.any(after[name] != before[name]) for name in before)


@pytest.mark.parametrize(
  ("override", "told"),
  [
    ("weight=-1.0", "objective hinge: weight must be > 0, got -1.0"),
    ("wieght=1.0", "did you mean objective.weight?"),
    ("margin=wide", "objective.margin must be float, got 'wide'"),
    ("reduction=mean", "'mean'"),
    ("name=hing", "Did you mean 'hinge'?"),
  ],
)
def test_its_bad_options_are_refused_by_name(
  folder, registered, tmp_path, capsys, override, told
):
  assert _train(folder, tmp_path / "run", override) == 2
  assert told in capsys.readouterr().err.splitlines()[-1]
  assert not (tmp_path / "run").exists()


def test_without_the_entry_it_is_unknown(folder, tmp_path, capsys):
  assert _train(folder, tmp_path / "run") == 2
  assert "unknown objective 'hinge'" in capsys.readouterr().err
