"""The launch scripts: valid bash, and the commands that --dry-run prints."""

import os
import pathlib
import shlex
import subprocess

import pytest

LAUNCH = pathlib.Path(__file__).resolve().parent.parent / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.glob("*.sh"))

# A value with a space and a quote must arrive as one argument, unchanged.
TRAIN = ["--config=configs/quickstart.py", "--workdir=/shared/it's a run"]


def _run(script, *arguments, **environment):
  return subprocess.run(
    ["bash", str(LAUNCH / script), *arguments],
    capture_output=True,
    text=True,
    timeout=60,
    env={"PATH": os.environ["PATH"], **environment},
  )


def _dry_run(script, *arguments, **environment):
  """The printed commands, each as its list of arguments."""
  result = _run(script, "--dry-run", *arguments, **environment)
  assert result.returncode == 0, result.stderr
  assert not result.stderr
  return [shlex.split(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("script", SCRIPTS)
def test_is_valid_bash_and_executable(script):
  subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)
  assert os.access(LAUNCH / script, os.X_OK)


def test_cpu8():
  (command,) = _dry_run("cpu8.sh", *TRAIN)
  flag = "--xla_force_host_platform_device_count=8"
  assert command == [
    *("env", "JAX_PLATFORMS=cpu", f"XLA_FLAGS={flag}", "opd-jax", "train"),
    *TRAIN,
  ]


def test_cpu8_keeps_the_users_flags():
  (command,) = _dry_run("cpu8.sh", *TRAIN, XLA_FLAGS="--a=1", DEVICES="4")
  flag = "--xla_force_host_platform_device_count=4"
  assert f"XLA_FLAGS=--a=1 {flag}" in command


def test_cpu8_runs_the_command():
  result = _run("cpu8.sh", *TRAIN, OPD_JAX="echo")
  assert result.stdout == f"train {' '.join(TRAIN)}\n"


def test_gpu_slurm():
  (command,) = _dry_run("gpu_slurm.sh", *TRAIN)
  assert command == [
    *("srun", "--kill-on-bad-exit=1", ".venv/bin/opd-jax", "train"),
    "--distributed",
    *TRAIN,
  ]


def test_tpu_vm():
  (command,) = _dry_run(
    "tpu_vm.sh", "--tpu=pod", "--zone=us-east5-a", "--", *TRAIN
  )
  *gcloud, remote = command
  assert gcloud == [
    *("gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod"),
    *("--zone=us-east5-a", "--worker=all"),
  ]
  assert remote.startswith("--command=")
  # What the shell of the host makes of it.
  words = shlex.split(remote.removeprefix("--command="))
  assert words == [
    *("cd", "opd_jax", "&&", ".venv/bin/opd-jax", "train", "--distributed"),
    *TRAIN,
  ]


def test_tpu_vm_setup_comes_first():
  commands = _dry_run(
    *("tpu_vm.sh", "--tpu=pod", "--zone=z", "--project=p", "--setup", "--"),
    *TRAIN,
  )
  archive, copy, install, train = commands
  assert archive[0] == "git"
  assert copy[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "scp"]
  assert "'.[tpu,gcs]'" in install[-1]
  assert "opd-jax train" in train[-1]
  for command in (copy, install, train):
    assert "--project=p" in command
    assert "--worker=all" in command


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--zone=z", "--", "--config=c"], "--tpu=NAME is missing"),
    (["--tpu=t", "--", "--config=c"], "--zone=ZONE is missing"),
    (["--tpu=t", "--zone=z"], "arguments of opd-jax train are missing"),
    (["--tpu=t", "--config=c"], "unknown argument --config=c"),
  ],
)
def test_tpu_vm_bad_arguments(arguments, message):
  result = _run("tpu_vm.sh", *arguments)
  assert result.returncode == 2
  assert message in result.stderr
  assert "--dry-run" in result.stderr, "shows the usage"
