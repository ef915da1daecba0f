"""The commands of the README run as they are printed.

They run in their order, in one folder that has the checkout's files, with the
environment of a user: one CPU device, optimised code. Left out are those that
install something, need another machine, or stand for a command with a
placeholder in capitals. `make quickstart` is run by its last command.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

# Before any test imports transformers, which would not see it later.
try:
  import torch
except ImportError:
  torch = None

REPO = pathlib.Path(__file__).resolve().parent.parent
README = (REPO / "README.md").read_text()
MAKEFILE = (REPO / "Makefile").read_text()
LIMIT_SECONDS = 600

# Why a command is not run here, by what it starts with.
NOT_HERE = {
  "make ": "makes an environment",
  "pip ": "installs",
  "source ": "is for the shell",
  "launch/": "needs a pod; see launch_test.py",
}
PLACEHOLDER = re.compile(r"(?<![\w/.])[A-Z]{2,}(?![\w/.])")


def commands():
  """Commands of the README's shell blocks, continued lines joined."""
  found = []
  for block in re.findall(r"^```sh\n(.*?)^```", README, re.S | re.M):
    for line in block.replace("\\\n", " ").splitlines():
      command = " ".join(line.partition(" #")[0].split())
      if command:
        found.append(command)
  return found


def runs_here(command):
  return not command.startswith(tuple(NOT_HERE)) and not PLACEHOLDER.search(
    command
  )


def run(folder, command):
  """Runs a command as a user would; returns what it printed."""
  environment = {
    **os.environ,
    "XLA_FLAGS": "",
    "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONPATH": str(REPO),
  }
  done = subprocess.run(
    ["bash", "-c", command],
    cwd=folder,
    env=environment,
    capture_output=True,
    text=True,
    timeout=LIMIT_SECONDS,
    check=False,
  )
  assert done.returncode == 0, (
    f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
  )
  return done.stdout


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
  """A checkout in which the quickstart has run, and what it printed."""
  folder = tmp_path_factory.mktemp("checkout")
  for name in ("configs", "checkpoints"):
    shutil.copytree(REPO / name, folder / name)
  arguments = re.search(r"\$\(BIN\)/opd-jax (train .*?)\n\n", MAKEFILE, re.S)[1]
  return folder, run(folder, f"opd-jax {arguments}")


def test_there_is_much_to_run():
  assert "make quickstart" in commands()
  kinds = {c.split()[1] for c in commands() if runs_here(c)}
  assert kinds >= {"sft", "eval", "generate", "preflight", "export"}


@pytest.mark.slow
def test_quickstart(quickstart):
  folder, told = quickstart
  summary = folder / "runs/quickstart/summary.json"
  figures = json.loads(summary.read_text())
  before, after = (figures[f"student_{stage}"] for stage in ("before", "after"))
  assert figures["teacher"]["avg_at_8"] >= 0.9
  assert 0.1 <= before["avg_at_8"] <= 0.6
  assert after["avg_at_8"] >= before["avg_at_8"] + 0.25
  for values in (figures["teacher"], before, after):
    assert 0 <= values["low"] < values["avg_at_8"] < values["high"] <= 1
    assert f"{100 * values['avg_at_8']:.1f} %" in told
  assert told.count("\n  after   ") == 3
  assert f"Hugging Face checkpoint: {figures['export']}" in told


@pytest.mark.slow
@pytest.mark.skipif(torch is None, reason="torch is not installed")
def test_transformers_loads_its_export(quickstart):
  from transformers import AutoModelForCausalLM, AutoTokenizer

  folder = quickstart[0] / "runs/quickstart/export"
  model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
  tokenizer = AutoTokenizer.from_pretrained(folder)
  ids = tokenizer("9+8-5+4?", return_tensors="pt")["input_ids"]
  with torch.no_grad():
    drawn = model.generate(ids, max_new_tokens=48, do_sample=False)[0]
  text = tokenizer.decode(drawn, skip_special_tokens=True)
  written = folder / "completion.json"
  run(
    folder,
    "opd-jax generate --model=. --prompt='9+8-5+4?' --temperature=0 "
    f"--max_new_tokens=48 --json={written}",
  )
  (completion,) = json.loads(written.read_text())
  assert text == completion["prompt"] + completion["text"]
  assert text.endswith("#16")


@pytest.mark.slow
def test_commands_run_as_printed(quickstart):
  folder, _ = quickstart
  for command in filter(runs_here, commands()):
    run(folder, command)
