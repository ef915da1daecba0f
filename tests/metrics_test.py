"""Logs: what is in the files, after a resume too, and on the screen."""

import io
import json
import re
import struct

import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from tensorboardX.proto import event_pb2

from opd_jax import metrics


def read_jsonl(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def read_scalars(folder):
  """Scalars by (name, step), as TensorBoard shows them."""
  scalars = {}
  for path in sorted(folder.iterdir()):
    content, offset = path.read_bytes(), 0
    while offset < len(content):
      (length,) = struct.unpack_from("<Q", content, offset)
      event = event_pb2.Event.FromString(
        content[offset + 12 : offset + 12 + length]
      )
      offset += 16 + length
      if event.HasField("session_log"):
        scalars = {
          key: value for key, value in scalars.items() if key[1] < event.step
        }
      for value in event.summary.value:
        scalars[value.tag, event.step] = value.simple_value
  return scalars


def write_steps(workdir, steps, resumed_step=None):
  writer = metrics.Writer(workdir, resumed_step)
  for step in steps:
    writer.metrics(step, {"train/loss": 1 / step, "train/rows": step})
    writer.samples(step, [{"prompt": "a\n", "completion": f"é\u2028{step}"}])
  return writer


def test_a_resumed_log_equals_the_uninterrupted_one(tmp_path):
  write_steps(tmp_path / "whole", range(1, 7)).close()
  killed = write_steps(tmp_path / "resumed", range(1, 6))
  killed.close()
  for name in ("metrics.jsonl", "samples.jsonl"):
    with (tmp_path / "resumed" / name).open("a") as file:
      file.write('{"step": 6, "train/lo')  # Killed while writing.
  write_steps(tmp_path / "resumed", range(4, 7), resumed_step=3).close()
  for name in ("metrics.jsonl", "samples.jsonl"):
    files = [tmp_path / run / name for run in ("whole", "resumed")]
    assert files[0].read_bytes() == files[1].read_bytes()
  boards = [
    read_scalars(tmp_path / run / "tensorboard") for run in ("whole", "resumed")
  ]
  assert boards[0] == boards[1]
  assert boards[0]["train/loss", 4] == 0.25
  assert len(boards[0]) == 12


def test_a_fresh_start_drops_an_old_log(tmp_path):
  write_steps(tmp_path, [0.5, 1]).close()
  write_steps(tmp_path, [2]).close()
  assert read_jsonl(tmp_path / "metrics.jsonl") == [
    {"step": 2, "train/loss": 0.5, "train/rows": 2.0}
  ]
  assert len(read_jsonl(tmp_path / "samples.jsonl")) == 1


def test_values_that_are_not_finite_are_absent(tmp_path):
  writer = metrics.Writer(tmp_path)
  writer.metrics(
    1,
    {
      "a": float("nan"),
      "b": jnp.float32(jnp.inf),
      "c": np.float32(0.5),
      "d": jnp.int32(3),
    },
  )
  # A record is on disk at once: a killed run keeps its log.
  assert read_jsonl(tmp_path / "metrics.jsonl") == [
    {"step": 1, "c": 0.5, "d": 3.0}
  ]
  writer.close()


def test_check_finite_names_the_metric_and_the_step():
  metrics.check_finite({"train/loss": 1.0, "a": jnp.float32(2)}, 1)
  with pytest.raises(
    FloatingPointError,
    match=r"train/loss = nan, b = -inf at step 11; lower",
  ):
    metrics.check_finite(
      {"train/loss": jnp.float32(jnp.nan), "a": 1.0, "b": -float("inf")},
      11,
    )


def test_progress_prints_plain_lines_off_a_terminal():
  screen = io.StringIO()
  progress = metrics.Progress(
    200, start=100, console=rich.console.Console(file=screen, width=40)
  )
  progress.update(100, {"held_out/loss": 2.0})
  progress.update(110, {"train/loss": 0.5, "train/tokens_per_second": 12345.6})
  progress.close()
  lines = screen.getvalue().splitlines()
  assert lines[0] == "step 100/200  held-out 2.0000"
  assert re.fullmatch(
    r"step 110/200  loss 0\.5000  tokens/s 12,346  \d+ s left", lines[1]
  )
  assert len(lines) == 2


def test_progress_keeps_the_newest_values_in_a_bar():
  screen = io.StringIO()
  progress = metrics.Progress(
    20,
    console=rich.console.Console(file=screen, force_terminal=True, width=120),
  )
  progress.update(10, {"held_out/loss": 2.0})
  progress.update(12, {"train/loss": 0.5})
  progress.close()
  text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
  assert re.search(r"step 12/20 .*loss 0\.5000  held-out 2\.0000", text)
