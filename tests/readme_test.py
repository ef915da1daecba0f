"""The commands of the README run as they are printed.

They run in their order, in one folder that has the checkout's files, with the
environment of a user: one CPU device, optimised code. Left out are those that
install something, need another machine, or stand for a command with a
placeholder in capitals.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

REPO = pathlib.Path(__file__).resolve().parent.parent
README = (REPO / "README.md").read_text()
LIMIT_SECONDS = 400

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


def test_there_is_much_to_run():
  kinds = {c.split()[1] for c in commands() if c.startswith("opd-jax ")}
  assert {"train", "sft", "eval", "generate", "preflight", "export"} <= kinds
  assert sum(map(runs_here, commands())) >= 6


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
  folder = tmp_path_factory.mktemp("checkout")
  for name in ("configs", "checkpoints"):
    shutil.copytree(REPO / name, folder / name)
  return folder


@pytest.mark.slow
def test_commands_run_as_printed(checkout):
  environment = {
    **os.environ,
    "XLA_FLAGS": "",
    "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONPATH": str(REPO),
  }
  for command in filter(runs_here, commands()):
    done = subprocess.run(
      ["bash", "-c", command],
      cwd=checkout,
      env=environment,
      capture_output=True,
      text=True,
      timeout=LIMIT_SECONDS,
      check=False,
    )
    assert done.returncode == 0, (
      f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    )
