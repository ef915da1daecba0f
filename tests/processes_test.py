"""What processes tell each other, and runs of several.

These are started as by a SLURM cluster, or by a user who names them.
"""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from opd_jax import messages, preflight, processes, setup
from opd_jax.cli import distributed
from opd_jax.config import RunConfig
from opd_jax.data.ragged import Ragged
from opd_jax.parsing import parse
from opd_jax.sharding import make_mesh
from opd_jax.train import train
from tests import pair

SAME = 50  # Steps that are compared with one process.
HEARTBEAT = 10
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


def _start(folder, workdir, *overrides, count=2, slurm=True):
  """Processes that run `opd-jax train`, of four devices together."""
  # JAX makes the coordinator's port of the number of a SLURM job.
  port = _free_port()
  flags = f"--xla_force_host_platform_device_count={4 // count}"

  def variables(index):
    return {
      "SLURM_JOB_ID": str(port - PORTS.start),
      "SLURM_STEP_NODELIST": "localhost",
      "SLURM_STEP_NUM_NODES": "1",
      "SLURM_NTASKS": str(count),
      "SLURM_PROCID": str(index),
      "SLURM_LOCALID": str(index),
    }

  def named(index):
    return (
      f"--coordinator=localhost:{port}",
      f"--processes={count}",
      f"--process_id={index}",
    )

  return [
    subprocess.Popen(
      [
        *(sys.executable, "-m", "opd_jax.cli", "train"),
        f"--config={folder}/config.py:{folder}",
        f"--workdir={workdir}",
        f"--heartbeat={HEARTBEAT}",
        *(("--distributed",) if slurm else named(index)),
        *(f"--config.{override}" for override in overrides),
      ],
      env={
        **os.environ,
        "XLA_FLAGS": f"{flags} --xla_backend_optimization_level=0",
        **(variables(index) if slurm else {}),
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(count)
  ]


def _finish(started, timeout=200):
  """Exit status, standard output and standard error of each."""
  results = []
  for process in started:
    out, err = process.communicate(timeout=timeout)
    results.append((process.returncode, out, err))
  return results


def _records(workdir, name="metrics.jsonl"):
  lines = (workdir / name).read_text().split("\n")[:-1]
  return [json.loads(line) for line in lines]


def _wait_for_step(workdir, started, step):
  """Until the log has a record of this step, or of a later one."""
  log = workdir / "metrics.jsonl"
  while not (
    log.exists()
    and any("train/loss" in r and r["step"] >= step for r in _records(workdir))
  ):
    if any(process.poll() is not None for process in started):
      pytest.fail(f"ended before step {step}: {_finish(started)}")
    time.sleep(0.02)


def _write(folder, values):
  (folder / "config.json").write_text(json.dumps(values))
  (folder / "config.py").write_text(CONFIG)


def _train_alone(monkeypatch, values, workdir):
  """The run in this process, on one device."""
  with monkeypatch.context() as patch:
    patch.setattr(
      setup, "make_mesh", lambda sizes: make_mesh({}, jax.devices()[:1])
    )
    return train(parse(RunConfig, values), workdir)


def test_messages_go_in_pieces(monkeypatch):
  """Two processes that say the same; the last piece is not full."""
  monkeypatch.setattr(processes, "_PIECE", 2048)
  monkeypatch.setattr(
    processes.multihost_utils,
    "process_allgather",
    lambda piece: np.stack([piece, piece]),
  )
  for size in (0, 1, 1024, 2048, 5000):
    told = np.random.default_rng(size).bytes(size)
    assert processes._gathered(told) == [told, told]


def test_messages_are_read_as_they_were():
  """All kinds of values that processes send."""
  report = preflight.Report(
    sections=(
      preflight.Section(
        title="memory",
        lines=("a",),
        figures={"bytes": 2**40, "share": np.float32(0.5), "none": None},
      ),
    )
  )
  assert messages.unpack(messages.pack((None, report))) == (None, report)
  rows = [np.arange(3, dtype=np.int32), np.zeros(0, np.int32)]
  sent = {"rows": Ragged.of(rows), 7: ["é", (True, float("inf"), -1)]}
  found = messages.unpack(messages.pack(sent))
  assert found[7] == sent[7]
  for row, expected in zip(found["rows"].rows(), rows, strict=True):
    np.testing.assert_array_equal(row, expected, strict=True)


def test_a_message_runs_nothing():
  for value in (
    print,
    b"x",
    np.array(["x"]),
    dataclasses.make_dataclass("D", ()),
  ):
    with pytest.raises(TypeError, match="is not sent"):
      messages.pack(value)
  for name in (["subprocess", "Popen"], ["opd_jax.messages", "pack"]):
    with pytest.raises(TypeError, match="is no dataclass of opd_jax"):
      messages._read({"dataclass": name, "fields": {"args": "true"}}, [])


def test_shares_are_whole_and_even(monkeypatch):
  for count, of in ((10, 4), (3, 4), (0, 2), (8, 1)):
    monkeypatch.setattr(jax, "process_count", lambda of=of: of)
    shares = []
    for index in range(of):
      monkeypatch.setattr(jax, "process_index", lambda index=index: index)
      shares.append(processes.share(count))
    assert [place for share in shares for place in share] == [*range(count)]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def asked_on_the_first(completion, answer):
  """No other process is to ask."""
  if jax.process_index() > 0:
    raise KeyError(answer)
  return float(len(completion) % 2)


@pytest.mark.slow
def test_four_processes_two_and_one_make_one_run(monkeypatch, tmp_path):
  """Four are killed, two stopped, one finishes; each on a mesh of its own.

  On the mesh of the two, each has the rows of the other.
  """
  folder = pair.write_pair(tmp_path)
  values = pair.config_of(
    folder,
    steps=10_000,
    held_out={},
    sampling={"max_new_tokens": 4},
    checkpoint={"every": 25, "keep_best": False},
    eval={
      "source": {
        "path": str(folder / "held_out.jsonl"),
        "answer": "{text}",
        "rows": 2,
      },
      "every": 25,
      "verifier": f"{__name__}:asked_on_the_first",
    },
  )
  values["log"]["samples"] = 8
  _write(folder, values)
  one, many = tmp_path / "one", tmp_path / "many"

  started = _start(
    *(folder, many, "mesh.fsdp=2", "mesh.tensor=2"), count=4, slurm=False
  )
  _wait_for_step(many, started, SAME)
  started[3].kill()
  began = time.monotonic()
  results = _finish(started)
  assert time.monotonic() - began < 3 * HEARTBEAT
  assert [status for status, *_ in results] == [1, 1, 1, -9], results
  for _, _, err in results[:3]:
    assert "Traceback" in err
    line = err.splitlines()[-1]
    assert line.startswith("opd-jax: error: process ")
    assert "of 4 lost another one" in line
    assert "the same command resumes" in line
  drawn = _records(many, "samples.jsonl")
  steps = _records(many)

  started = _start(folder, many, "mesh.fsdp=1", "mesh.tensor=4")
  _wait_for_step(many, started, steps[-1]["step"] + 1)
  started[1].send_signal(signal.SIGTERM)
  results = _finish(started)
  assert [status for status, *_ in results] == [143, 143], results
  resumed = re.search(r"resuming after step (\d+)", results[0][2])
  assert 0 < int(resumed[1]) <= steps[-1]["step"]
  assert "stopped after step" in results[0][2]
  assert "stopped after step" not in results[1][2]

  last = json.loads((many / "summary.json").read_text())["step"] + 1
  alone = _train_alone(monkeypatch, {**values, "steps": last}, many)
  assert alone.finished
  assert [r["step"] for r in _records(many) if "train/loss" in r] == [
    *range(1, last + 1)
  ]

  _train_alone(monkeypatch, {**values, "steps": SAME}, one)
  expected = _records(one, "samples.jsonl")
  assert len(expected) == 8 * SAME
  assert drawn[: len(expected)] == expected
  assert _records(many, "samples.jsonl")[: len(expected)] == expected
  for found, record in zip(steps, _records(one), strict=False):
    assert found["step"] == record["step"]
    for name in ("optimizer/grad_norm", "train/loss", "eval/accuracy"):
      assert found.get(name) == pytest.approx(record.get(name), abs=1e-6), name


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
  _write(folder, values)
  return values


@pytest.mark.slow
def test_two_processes_make_the_same_rewards(monkeypatch, tmp_path):
  """The second's verifier says otherwise; the run is that of one process."""
  folder = pair.write_pair(tmp_path)
  values = rewarded(folder, "begins_on_the_first")
  _train_alone(monkeypatch, values, tmp_path / "one")
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
def test_two_processes_fail_together(tmp_path):
  """Only the first tries the verifier; both say why, and neither waits."""
  folder = pair.write_pair(tmp_path)
  rewarded(folder, "fails_on_the_first")
  results = _finish(_start(folder, tmp_path / "two", "mesh.fsdp=4"))
  assert all(result[0] == 2 for result in results), results
  assert "raised KeyError" in results[0][2]
  assert results[0][2] == results[1][2]


# The second ends as it is told to, while the first waits for it.
WAITING = """import os
import signal
import sys

import jax
from absl import flags

from opd_jax import cli, processes
from opd_jax.cli import distributed, train
from opd_jax.errors import InputError


def run(arguments):
  values = flags.FlagValues()
  distributed.define(values)
  end, *rest = arguments
  values(["train", *rest])
  with distributed.Joined(values):
    if jax.process_index() == 1 and end == "complain":
      raise InputError("no such model; get it")
    if jax.process_index() == 1:
      os.kill(os.getpid(), signal.SIGSTOP)
    processes.meet()


train.run = run
sys.exit(cli.main(["train", *sys.argv[1:]]))
"""


def _wait_for_second(end, heartbeat):
  port = _free_port()
  started = [
    subprocess.Popen(
      [
        *(sys.executable, "-c", WAITING, end),
        f"--coordinator=localhost:{port}",
        "--processes=2",
        f"--process_id={index}",
        f"--heartbeat={heartbeat}",
      ],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(2)
  ]
  try:
    return _finish(started[:1] if end == "stop" else started, timeout=60)
  finally:
    for process in started:
      process.kill()
      process.communicate()


@pytest.mark.slow
def test_bad_input_of_one_process_ends_all():
  """Wherever the others are; here they wait for it."""
  (first, _, told), (second, _, own) = _wait_for_second("complain", 6)
  assert (first, second) == (2, 2), (told, own)
  complaint = "no such model; get it"
  assert told == f"opd-jax: error: process 1 of 2 ended: {complaint}\n"
  assert own == f"opd-jax: error: {complaint}\n"


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_others():
  """Its connections stay open: only the heartbeat tells."""
  began = time.monotonic()
  ((status, _, err),) = _wait_for_second("stop", 4)
  assert status not in (0, 2), err
  assert "heartbeat" in err
  assert time.monotonic() - began < 40


@pytest.mark.parametrize(
  ("error", "count", "loss"),
  [
    (jax.errors.JaxRuntimeError("INTERNAL: Gloo: closed by peer"), 2, True),
    (jax.errors.JaxRuntimeError("UNAVAILABLE: no heartbeat"), 2, True),
    (jax.errors.JaxRuntimeError("UNAVAILABLE: no heartbeat"), 1, False),
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: HBM"), 2, False),
    (RuntimeError("503 Service Unavailable: https://bucket"), 2, False),
  ],
)
def test_only_jax_says_that_a_process_is_lost(error, count, loss):
  assert distributed.is_loss(error, count) is loss
