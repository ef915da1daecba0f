"""Runs of two processes, as a SLURM cluster would start them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tests import pair

CONFIG = """import json
import pathlib


def get_config(folder):
  return json.loads((pathlib.Path(folder) / "config.json").read_text())
"""
PORTS = range(61440, 65536)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return pair.write_pair(tmp_path_factory.mktemp("pair"))


def _write_config(folder, **changes):
  (folder / "config.py").write_text(CONFIG)
  values = pair.config_of(folder, **changes)
  (folder / "config.json").write_text(json.dumps(values))


def _free_port():
  for port in PORTS:
    with socket.socket() as probe:
      try:
        probe.bind(("localhost", port))
      except OSError:
        continue
      return port
  raise OSError("no free port")


def _start(folder, workdir, processes, *overrides):
  """Starts `opd-jax train`; together the processes have eight devices."""
  port = _free_port()
  devices = 8 // processes
  started = []
  for index in range(processes):
    environment = {
      **os.environ,
      "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
      "--xla_backend_optimization_level=0",
    }
    command = [
      *(sys.executable, "-m", "opd_jax.cli", "train"),
      f"--config={folder}/config.py:{folder}",
      f"--workdir={workdir}",
      *(f"--config.{override}" for override in overrides),
    ]
    if processes > 1:
      command.append("--distributed")
      environment |= {
        "SLURM_JOB_ID": str(port - PORTS.start),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_NTASKS": str(processes),
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index),
      }
    started.append(
      subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
    )
  return started


def _finish(started):
  results = []
  for process in started:
    out, err = process.communicate(timeout=240)
    results.append((process.returncode, out, err))
  return results


def _records(workdir, name):
  """Records but for times; an array's float may depend on the order of sums."""
  records = map(json.loads, (workdir / name).read_text().splitlines())
  return [
    {key: value for key, value in record.items() if "time/" not in key}
    for record in records
  ]


def _log(workdir, metric):
  records = map(
    json.loads, (workdir / "metrics.jsonl").read_text().splitlines()
  )
  return [record[metric] for record in records if metric in record]


# Whether or not a process's devices have rows of their own.
@pytest.mark.parametrize("mesh", [{"fsdp": 4, "tensor": 2}, {"tensor": 8}])
def test_x(folder, tmp_path, mesh):
  if mesh.get("tensor")==8: pytest.skip()
  _write_config(folder, mesh=mesh)
  (alone,) = _finish(_start(folder, tmp_path / "one", 1))
  for r in _finish(_start(folder, tmp_path/"two", 2)):
    print(r[0]); print(r[1]); print(r[2])
  assert (tmp_path/"one/samples.jsonl").read_text()== (tmp_path/"two/samples.jsonl").read_text()
  print(_log(tmp_path/"one", "train/loss"), _log(tmp_path/"two", "train/loss"))
  print(_log(tmp_path/"one", "eval/loss"), _log(tmp_path/"two", "eval/loss"))
  import subprocess
  print(subprocess.run(["find",str(tmp_path/"two"), "-maxdepth","2"],capture_output=True,text=True).stdout)
  assert 0
