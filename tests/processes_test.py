"""Runs of two processes, as a SLURM cluster would start them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from opd_jax import setup
from opd_jax.config import RunConfig
from opd_jax.parsing import parse
from opd_jax.sharding import make_mesh
from opd_jax.train import train
from tests import pair

STEPS = 24
PORTS = range(61440, 65536)
CONFIG = """import json
import pathlib


def get_config(folder):
  return json.loads((pathlib.Path(folder) / "config.json").read_text())
"""


def _free_port():
  for port in PORTS:
    with socket.socket() as probe:
      try:
        probe.bind(("localhost", port))
      except OSError:
        continue
      return port
  raise OSError("no free port")


def _start(folder, workdir, *overrides):
  """Two processes of two devices each run `opd-jax train`."""
  # JAX makes the coordinator's port of the number of the job.
  job = _free_port() - PORTS.start
  flags = "--xla_force_host_platform_device_count=2"
  return [
    subprocess.Popen(
      [
        *(sys.executable, "-m", "opd_jax.cli", "train", "--distributed"),
        f"--config={folder}/config.py:{folder}",
        f"--workdir={workdir}",
        *(f"--config.{override}" for override in overrides),
      ],
      env={
        **os.environ,
        "XLA_FLAGS": f"{flags} --xla_backend_optimization_level=0",
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index),
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in (0, 1)
  ]


def _finish(processes):
  """Exit status, standard output and standard error of each."""
  results = []
  for process in processes:
    out, err = process.communicate(timeout=200)
    results.append((process.returncode, out, err))
  return results


def _wait_for_step(workdir, processes):
  """Until the log has a record of a step."""
  log = workdir / "metrics.jsonl"
  while not (log.exists() and "train/loss" in log.read_text()):
    if any(process.poll() is not None for process in processes):
      pytest.fail(f"ended before its first step: {_finish(processes)}")
    time.sleep(0.02)


@pytest.mark.slow
def test_two_processes_stop_together_resume_and_equal_one(
  monkeypatch, tmp_path
):
  """On the second mesh, every process has the rows of the other."""
  folder = pair.write_pair(tmp_path)
  values = pair.config_of(
    folder,
    steps=STEPS,
    held_out={},
    checkpoint={"every": 100, "keep_best": False},
    eval={
      "source": {"path": str(folder / "held_out.jsonl"), "answer": "{text}"},
      "samples": 2,
      "verifier": "exact",
    },
  )
  (folder / "config.json").write_text(json.dumps(values))
  (folder / "config.py").write_text(CONFIG)
  with monkeypatch.context() as patch:
    patch.setattr(
      setup, "make_mesh", lambda sizes: make_mesh({}, jax.devices()[:1])
    )
    train(parse(RunConfig, values), tmp_path / "one")

  workdir = tmp_path / "two"
  processes = _start(folder, workdir, "mesh.fsdp=2", "mesh.tensor=2")
  _wait_for_step(workdir, processes)
  processes[1].send_signal(signal.SIGTERM)
  results = _finish(processes)
  assert [result[0] for result in results] == [143, 143], results
  assert "stopped after step" in results[0][2]
  assert "stopped after step" not in results[1][2]
  summary = json.loads((workdir / "summary.json").read_text())
  assert 1 <= summary["step"] < STEPS

  results = _finish(_start(folder, workdir, "mesh.fsdp=1", "mesh.tensor=4"))
  assert [result[0] for result in results] == [0, 0], results
  assert f"{STEPS} steps in" in results[0][1]
  assert "steps in" not in results[1][1]
  assert f"resuming after step {summary['step']}" in results[0][2]
  one, two = tmp_path / "one", workdir
  assert (one / "samples.jsonl").read_text() == (
    two / "samples.jsonl"
  ).read_text()
  weights = [
    load_file(run / "export" / "model.safetensors") for run in (one, two)
  ]
  for name, expected in weights[0].items():
    np.testing.assert_allclose(weights[1][name], expected, atol=1e-4)

  measured = [
    json.loads((run / "summary.json").read_text())["after"]
    for run in (one, two)
  ]
  assert measured[0].keys() == measured[1].keys()
  assert measured[1]["eval/length_mean"] > 0

  # A finished run may be run again: it writes its export anew.
  results = _finish(_start(folder, workdir, "mesh.fsdp=1", "mesh.tensor=4"))
  assert [result[0] for result in results] == [0, 0], results
  again = load_file(workdir / "export" / "model.safetensors")
  for name, expected in weights[1].items():
    np.testing.assert_array_equal(again[name], expected)


def rewarded(folder, verifier):
  """The values of a config of `grpo`, which is written to the folder."""
  values = pair.config_of(
    folder,
    steps=2,
    held_out={},
    objective={"name": "grpo"},
    reward={"verifier": f"tests.rewards_test:{verifier}"},
  )
  values["data"]["sources"]["texts"]["answer"] = "{text}"
  (folder / "config.json").write_text(json.dumps(values))
  (folder / "config.py").write_text(CONFIG)
  return values


@pytest.mark.slow
def test_two_processes_make_the_same_rewards(monkeypatch, tmp_path):
  """The second's verifier says otherwise; the run is that of one process."""
  folder = pair.write_pair(tmp_path)
  values = rewarded(folder, "begins_on_the_first")
  with monkeypatch.context() as patch:
    patch.setattr(
      setup, "make_mesh", lambda sizes: make_mesh({}, jax.devices()[:1])
    )
    train(parse(RunConfig, values), tmp_path / "one")
  results = _finish(
    _start(folder, tmp_path / "two", "mesh.fsdp=2", "mesh.tensor=2")
  )
  assert [result[0] for result in results] == [0, 0], results
  one, two = (
    [
      json.loads(line)["reward/mean"]
      for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
      if "train/loss" in line
    ]
    for name in ("one", "two")
  )
  assert one == two
  assert 0 < min(one) < 1
  weights = [
    load_file(tmp_path / name / "export" / "model.safetensors")
    for name in ("one", "two")
  ]
  for name, expected in weights[0].items():
    np.testing.assert_allclose(weights[1][name], expected, atol=1e-4)


@pytest.mark.slow
def test_two_processes_fail_together_at_a_completion(tmp_path):
  """Only the first verifies, and only it knows why; neither waits."""
  folder = pair.write_pair(tmp_path)
  rewarded(folder, "fails_on_the_first")
  results = _finish(_start(folder, tmp_path / "two", "mesh.fsdp=4"))
  assert all(result[0] == 2 for result in results), results
  assert "raised KeyError" in results[0][2]
  assert "failed on the first process" in results[1][2]
