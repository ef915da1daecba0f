"""Whole runs on a tiny pair: resume, termination, modes, meshes, the log."""

import json
import os
import signal

import jax
import numpy as np
import pytest

from opd_jax import setup as setup_lib
from opd_jax.checkpoint import Checkpoints
from opd_jax.config import RunConfig
from opd_jax.parsing import parse
from opd_jax.programs import Programs
from opd_jax.run_export import export_run
from opd_jax.sharding import make_mesh
from opd_jax.train import train
from tests import pair

TIMED = ("time/", "train/tokens_per_second", "train/tflops_per_device")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return pair.write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def one_device(monkeypatch):
  monkeypatch.setattr(
    setup_lib, "make_mesh", lambda sizes: make_mesh({}, jax.devices()[:1])
  )


def _run(folder, workdir, **changes):
  return train(parse(RunConfig, pair.config_of(folder, **changes)), workdir)


@pytest.fixture(scope="module")
def uninterrupted(folder, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("uninterrupted")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      setup_lib, "make_mesh", lambda sizes: make_mesh({}, jax.devices()[:1])
    )
    summary = _run(folder, workdir)
  return summary, workdir


def _records(workdir, name="metrics.jsonl"):
  return [
    {
      key: value
      for key, value in json.loads(line).items()
      if not key.startswith(TIMED)
    }
    for line in (workdir / name).read_text().splitlines()
  ]


def _arrays(workdir, step):
  """The arrays of a checkpoint, as they lie on disk."""
  import orbax.checkpoint as ocp

  path = workdir / "checkpoints" / str(step) / "state"
  with ocp.StandardCheckpointer() as reader:
    return jax.tree.leaves(reader.restore(path.resolve()))


def _terminate_after(monkeypatch, steps, number=signal.SIGTERM):
  """A signal arrives while step number `steps` runs."""
  run = Programs.__call__
  calls = []

  def counted(self, *arguments):
    calls.append(None)
    if len(calls) == steps:
      os.kill(os.getpid(), number)
    return run(self, *arguments)

  monkeypatch.setattr(Programs, "__call__", counted)


def test_a_run_leaves_what_it_promises(uninterrupted):
  summary, workdir = uninterrupted
  assert summary.finished
  assert summary.step == 6
  assert summary.after["held_out/loss"] < summary.before["held_out/loss"]
  assert json.loads((workdir / "summary.json").read_text()) == summary.to_json()
  assert (workdir / "export" / "model.safetensors").is_file()
  assert any((workdir / "tensorboard").iterdir())
  steps = [record for record in _records(workdir) if "train/loss" in record]
  assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
  assert {
    "loss/divergence",
    "student/entropy",
    "teacher/entropy",
    "teacher/kl",
    "mismatch/mean",
    "mismatch/max",
    "rollout/tokens",
    "rollout/length_mean",
    "rollout/length_max",
    "rollout/truncated",
    "optimizer/grad_norm",
    "optimizer/learning_rate",
  } <= steps[0].keys()
  samples = _records(workdir, "samples.jsonl")
  assert len(samples) == 12
  assert samples[0].keys() == {
    "step",
    "prompt",
    "completion",
    "length",
    "stopped",
  }
  kept = sorted(int(p.name) for p in (workdir / "checkpoints").glob("[0-9]*"))
  # Saved at 3 as is due; at 2 and 4 as the best so far; two stay.
  assert kept == [4, 6]


@pytest.mark.parametrize(
  ("stop_after", "number"), [(1, signal.SIGTERM), (5, signal.SIGINT)]
)
def test_resume_equals_uninterrupted_bit_for_bit(
  folder, uninterrupted, one_device, monkeypatch, tmp_path, stop_after, number
):
  """The stop is at no checkpoint; the data passes an epoch after 2.5 steps."""
  with monkeypatch.context() as patch:
    _terminate_after(patch, stop_after, number)
    stopped = _run(folder, tmp_path)
  assert not stopped.finished
  assert stopped.signal == number
  assert stopped.step == stop_after
  assert stopped.export is None
  resumed = _run(folder, tmp_path)
  whole, workdir = uninterrupted
  assert resumed.finished
  assert (resumed.before["held_out/loss"], resumed.after["held_out/loss"]) == (
    whole.before["held_out/loss"],
    whole.after["held_out/loss"],
  )
  assert _records(tmp_path) == _records(workdir)
  for name in ("samples.jsonl", "export/model.safetensors"):
    assert (tmp_path / name).read_bytes() == (workdir / name).read_bytes()
  for found, expected in zip(
    _arrays(tmp_path, 6), _arrays(workdir, 6), strict=True
  ):
    np.testing.assert_array_equal(found, expected)


def test_a_finished_run_is_not_run_again(
  folder, one_device, monkeypatch, uninterrupted
):
  summary, workdir = uninterrupted
  monkeypatch.setattr(Programs, "compile", lambda *_: pytest.fail("compiled"))
  again = _run(folder, workdir)
  assert (again.step, again.after["held_out/loss"]) == (
    6,
    summary.after["held_out/loss"],
  )


def test_split_draws_the_same_tokens(
  folder, uninterrupted, one_device, tmp_path
):
  split = _run(folder, tmp_path, mode="split")
  whole, workdir = uninterrupted
  assert _records(tmp_path, "samples.jsonl") == _records(
    workdir, "samples.jsonl"
  )
  np.testing.assert_allclose(
    split.after["held_out/loss"], whole.after["held_out/loss"], rtol=1e-6
  )


def test_eight_devices_draw_the_same_tokens(folder, uninterrupted, tmp_path):
  spread = _run(folder, tmp_path, mesh={"fsdp": 4, "tensor": 2})
  whole, workdir = uninterrupted
  assert _records(tmp_path, "samples.jsonl") == _records(
    workdir, "samples.jsonl"
  )
  np.testing.assert_allclose(
    spread.after["held_out/loss"], whole.after["held_out/loss"], rtol=1e-5
  )


def test_a_run_compiles_its_step_once(
  folder, one_device, monkeypatch, tmp_path
):
  compiled, during = [], []
  listening = [True]

  def listen(event, duration, **_):
    if listening[0] and "backend_compile" in event:
      compiled.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  run, programs = Programs.__call__, []

  def watched(self, *arguments):
    before = len(compiled)
    result = run(self, *arguments)
    during.append(len(compiled) - before)
    programs.append(self)
    return result

  monkeypatch.setattr(Programs, "__call__", watched)
  # Prompts of every length from 4 to 8 ids pass through it.
  _run(folder, tmp_path, held_out={}, steps=5)
  listening[0] = False
  assert list(programs[0].compiled) == ["train"]
  assert compiled
  assert during == [0] * 5


def test_the_time_split_changes_nothing(
  folder, uninterrupted, one_device, tmp_path
):
  log = {"every": 1, "sample_every": 1, "time_split_every": 2}
  _run(folder, tmp_path, log=log)
  _, workdir = uninterrupted
  assert _records(tmp_path) == _records(workdir)
  last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-2])
  assert last["time/sample"] > 0
  assert last["time/score"] > 0
  assert last["time/update"] >= 0


def test_a_diverged_run_stops_and_keeps_the_good_state(
  folder, one_device, tmp_path
):
  with pytest.raises(FloatingPointError, match=r"at step \d;"):
    _run(
      folder,
      tmp_path,
      optimizer={"learning_rate": 1e30},
      checkpoint={"every": 1},
      held_out={},
    )
  with pytest.raises(FloatingPointError):
    _run(
      folder,
      tmp_path / "unlogged",
      optimizer={"learning_rate": 1e30},
      log={"every": 100, "time_split_every": None},
      checkpoint={"every": 3},
      held_out={},
    )
  assert not list((tmp_path / "unlogged" / "checkpoints").glob("[0-9]*"))


def test_export_of_the_best_and_of_a_step(uninterrupted, tmp_path):
  _, workdir = uninterrupted
  best = export_run(workdir, tmp_path / "best", step="best")
  losses = {
    record["step"]: record["held_out/loss"]
    for record in _records(workdir)
    if "held_out/loss" in record
  }
  assert best == min((3, 6), key=losses.get)
  assert export_run(workdir, tmp_path / "last") == 6
  name = "model.safetensors"
  assert (tmp_path / "last" / name).read_bytes() == (
    workdir / "export" / name
  ).read_bytes()


def test_checkpoints_are_of_this_run_only(folder, uninterrupted, one_device):
  from opd_jax.errors import InputError

  _, workdir = uninterrupted
  with pytest.raises(InputError, match=r"seed: 0 saved, 1 given"):
    _run(folder, workdir, seed=1)
  assert Checkpoints(workdir / "checkpoints", None).latest() == 6


def test_sft_does_not_resume_it(folder, uninterrupted):
  from opd_jax.config import SftConfig
  from opd_jax.errors import InputError
  from opd_jax.sft import sft

  _, workdir = uninterrupted
  sources = {
    "texts": {"path": str(folder / "texts.jsonl"), "completion": "{text}"}
  }
  config = parse(
    SftConfig,
    {
      "student": {"path": str(folder / "student")},
      "data": {"sources": sources},
      "batch": {"rows": 8, "row_tokens": 64},
      "steps": 1,
    },
  )
  with pytest.raises(InputError, match="checkpoints of opd-jax train, not of"):
    sft(config, workdir)
