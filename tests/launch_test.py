"""The launch scripts: linted, and the commands that --dry-run prints."""

import os
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
import yaml

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
    env={"PATH": os.environ["PATH"]} | environment,
  )


def _dry_run(script, *arguments, **environment):
  """The printed commands, each as its list of arguments."""
  result = _run(script, "--dry-run", *arguments, **environment)
  assert result.returncode == 0, result.stderr
  assert not result.stderr
  return [shlex.split(line) for line in result.stdout.splitlines()]


def _linted(*command):
  """Runs a linter of the environment; its complaints are shown."""
  binary = pathlib.Path(sys.executable).parent / command[0]
  result = subprocess.run(
    [str(binary), *command[1:]], capture_output=True, text=True, timeout=60
  )
  assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_is_clean_and_executable(script):
  _linted("shellcheck", str(LAUNCH / script))
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
  assert "--python=3.12" in install[-1]
  assert "-c requirements/lock-py312.txt" in install[-1]
  assert re.search(r" uv==\d[\d.]+ ", install[-1])
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


QUEUED = ["--name=q", "--zone=z", "--type=v6e-8", "--runtime=v2-alpha-tpuv6e"]


def test_tpu_queued():
  create, describe, *runs, delete = _dry_run(
    "tpu_queued.sh", *QUEUED, "--spot", "--", *TRAIN
  )
  queue = ["gcloud", "compute", "tpus", "queued-resources"]
  assert create == [
    *(*queue, "create", "q", "--node-id=q", "--zone=z"),
    *("--accelerator-type=v6e-8", "--runtime-version=v2-alpha-tpuv6e"),
    "--spot",
  ]
  assert describe == [
    *(*queue, "describe", "q", "--zone=z", "--format=value(state.state)")
  ]
  assert delete == [*queue, "delete", "q", "--zone=z", "--force", "--quiet"]
  expected = _dry_run(
    "tpu_vm.sh", "--tpu=q", "--zone=z", "--setup", "--", *TRAIN
  )
  assert runs == expected


# Stands for gcloud: a slice is taken away twice, then the run is done.
GCLOUD = """#!/usr/bin/env bash
echo "$*" >> "$LOG"
case "$*" in
  *describe*) cat "$STATE" 2>/dev/null || { echo NOT_FOUND >&2; exit 1; } ;;
  *" create "*) echo ACTIVE > "$STATE" ;;
  *" delete "*) rm "$STATE" ;;
  *"opd-jax train"*)
    echo run >> "$RUNS"
    [ "$(wc -l < "$RUNS")" -gt "$LOST" ] && exit 0
    [ -n "$STAYS" ] || echo SUSPENDED > "$STATE"
    exit "${ENDS:-1}" ;;
esac
"""


def _queued(folder, **environment):
  """Of three attempts, with the gcloud above."""
  (folder / "gcloud").write_text(GCLOUD)
  (folder / "gcloud").chmod(0o755)
  return _run(
    *("tpu_queued.sh", *QUEUED, "--attempts=3", "--", *TRAIN),
    PATH=f"{folder}:{os.environ['PATH']}",
    TMPDIR=str(folder),
    POLL_SECONDS="0",
    **{name: str(folder / name) for name in ("LOG", "STATE", "RUNS")},
    **environment,
  )


@pytest.mark.parametrize(
  ("lost", "stays", "ends", "status", "runs", "told"),
  [
    (2, "", "1", 0, 3, "attempt 3 of 3"),
    (3, "", "1", 1, 3, "gave up after 3 attempts"),
    (1, "yes", "1", 1, 1, "still there; not started again"),
    (1, "yes", "2", 2, 1, "bad input; not started again"),
  ],
)
def test_tpu_queued_resumes_and_leaves_nothing(
  tmp_path, lost, stays, ends, status, runs, told
):
  result = _queued(tmp_path, LOST=str(lost), STAYS=stays, ENDS=ends)
  assert result.returncode == status, result.stderr
  assert told in result.stderr
  assert len((tmp_path / "RUNS").read_text().splitlines()) == runs
  assert not (tmp_path / "STATE").exists(), "the slice is deleted"
  log = (tmp_path / "LOG").read_text()
  assert log.count(" create ") == (runs if not stays else 1)
  assert not list(tmp_path.rglob("*.tar.gz")), "the archive is deleted"


def test_tpu_queued_does_not_look_for_ever(tmp_path):
  (tmp_path / "gcloud").write_text(
    "#!/usr/bin/env bash\n"
    'echo "$*" >> "$LOG"\n'
    'case "$*" in *describe*) echo PERMISSION_DENIED >&2 && exit 1 ;; esac\n'
  )
  (tmp_path / "gcloud").chmod(0o755)
  result = _run(
    *("tpu_queued.sh", *QUEUED, "--", *TRAIN),
    PATH=f"{tmp_path}:{os.environ['PATH']}",
    POLL_SECONDS="0",
    LOOKS="3",
    LOG=str(tmp_path / "LOG"),
  )
  assert result.returncode == 1
  assert "3 looks at the queue failed" in result.stderr
  assert "PERMISSION_DENIED" in result.stderr
  log = (tmp_path / "LOG").read_text()
  assert " create " not in log
  assert " delete " in log, "it may be there, and cost"


JOBSET = [
  *("--name=q", "--image=place/image:1", "--accelerator=tpu-v6e-slice"),
  *("--topology=4x4", "--hosts=4", "--chips=4"),
]


def test_gke_jobset(tmp_path):
  result = _run(
    *("gke_jobset.sh", *JOBSET, "--slices=2", "--dry-run", "--", *TRAIN)
  )
  assert result.returncode == 0, result.stderr
  (tmp_path / "manifest.yaml").write_text(result.stdout)
  _linted("yamllint", "--strict", str(tmp_path / "manifest.yaml"))
  manifest = yaml.safe_load(result.stdout)
  assert manifest["kind"] == "JobSet"
  assert manifest["spec"]["failurePolicy"] == {"maxRestarts": 20}
  (job,) = manifest["spec"]["replicatedJobs"]
  assert job["replicas"] == 2
  spec = job["template"]["spec"]
  assert spec["parallelism"] == spec["completions"] == 4
  pod = spec["template"]["spec"]
  assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
  (container,) = pod["containers"]
  assert container["args"] == ["train", "--distributed", *TRAIN]
  assert container["resources"]["limits"] == {"google.com/tpu": 4}


def test_gke_jobset_is_deleted():
  (command,) = _dry_run("gke_jobset.sh", "--name=q", "--delete")
  assert command == ["kubectl", "delete", "jobset", "q", "--namespace=default"]


def test_xpk():
  where = ["--cluster=c", "--workload=w"]
  (command,) = _dry_run(
    *("xpk.sh", *where, "--image=i", "--tpu-type=v6e-16", "--", *TRAIN)
  )
  *words, remote = command
  assert words == [
    *("xpk", "workload", "create", *where, "--docker-image=i"),
    *("--tpu-type=v6e-16", "--max-restarts=20"),
  ]
  assert shlex.split(remote.removeprefix("--command=")) == [
    *("opd-jax", "train", "--distributed", *TRAIN)
  ]
  (command,) = _dry_run("xpk.sh", *where, "--delete")
  assert command == ["xpk", "workload", "delete", *where]


@pytest.mark.parametrize(
  ("script", "arguments", "message"),
  [
    ("tpu_queued.sh", QUEUED[1:], "--name=NAME is missing"),
    ("tpu_queued.sh", QUEUED[:3], "--runtime=VERSION is missing"),
    ("tpu_queued.sh", [*QUEUED, "--attempts=x"], "--attempts=x is no number"),
    ("tpu_queued.sh", QUEUED, "arguments of opd-jax train are missing"),
    ("gke_jobset.sh", JOBSET[:-1], "--chips is missing"),
    ("gke_jobset.sh", [*JOBSET, "--hosts=four"], "--hosts=four is no number"),
    ("gke_jobset.sh", [*JOBSET, "--image=a b"], "characters that it cannot"),
    ("gke_jobset.sh", [*JOBSET, "--", "a\nb"], "an argument has several lines"),
    ("xpk.sh", ["--cluster=c"], "--workload is missing"),
    ("xpk.sh", ["--cluster=c", "--workload=w"], "--image is missing"),
  ],
)
def test_bad_arguments(script, arguments, message):
  result = _run(script, *arguments)
  assert result.returncode == 2
  assert message in result.stderr
  assert "--dry-run" in result.stderr, "shows the usage"


def test_dockerfile_installs_extras_that_there_are():
  project = tomllib.loads((LAUNCH.parent / "pyproject.toml").read_text())
  text = (LAUNCH / "Dockerfile").read_text()
  assert "python:3.12" in text
  used = re.findall(r"--build-arg ACCELERATOR=(\w+)", text)
  assert len(used) == 2
  assert {*used, "gcs"} <= project["project"]["optional-dependencies"].keys()
  copied = re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE)
  for name in " ".join(copied).split():
    assert (LAUNCH.parent / name).exists(), name
