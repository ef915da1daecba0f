"""The loop: when it measures, and what of it survives an interruption."""

import contextlib
import json

import jax
import jax.numpy as jnp
import pytest

from opd_jax import loop, sft
from opd_jax.config import SftConfig
from opd_jax.parsing import parse
from opd_jax.sharding import make_mesh
from tests import pair


class Probe:
  """A measurement that notes its calls and looks at the weights."""

  def __init__(self, every):
    self.every = every
    self.calls = 0

  def __call__(self, params):
    self.calls += 1
    leaves = jax.tree.leaves(params)
    return {"probe/weights": float(sum(jnp.sum(leaf) for leaf in leaves))}

  def examples(self, count):
    return [{"call": self.calls}][:count]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("pair")
  return pair.write_examples(pair.write_pair(folder))


def _run(folder, workdir, probe, *, stop_at=None):
  """Measures at 0, every so many steps, at checkpoints (4) and at the end."""
  values = pair.sft_config_of(
    folder, steps=10, held_out={}, checkpoint={"every": 4}
  )
  setup = sft.prepare(parse(SftConfig, values))
  mesh = make_mesh({}, jax.devices()[:1])
  task = sft.FineTuning(setup, sft.make_step(setup, mesh))
  with pytest.MonkeyPatch.context() as patch:
    if stop_at is not None:

      @contextlib.contextmanager
      def terminated():
        yield lambda step: step == stop_at

      patch.setattr(loop, "terminated", terminated)
    return loop.run(
      task, setup.examples, workdir, measurements=[probe], began=0.0
    )


def _measured(workdir):
  records = [
    json.loads(line)
    for line in (workdir / "metrics.jsonl").read_text().splitlines()
  ]
  return {
    record["step"]: record["probe/weights"]
    for record in records
    if "probe/weights" in record
  }


def test_measurements_survive_an_interruption(folder, tmp_path):
  whole = _run(folder, tmp_path / "whole", Probe(3))
  measured = _measured(tmp_path / "whole")
  assert list(measured) == [0, 3, 4, 6, 8, 9, 10]
  assert whole.before == {"probe/weights": measured[0]}
  assert whole.after == {"probe/weights": measured[10]}
  assert measured[0] != measured[10]

  first, second = Probe(3), Probe(3)
  stopped = _run(folder, tmp_path / "cut", first, stop_at=5)
  assert (stopped.step, stopped.finished) == (5, False)
  # 0, 3 and 4: being stopped is no reason to measure.
  assert first.calls == 3
  assert stopped.after == {"probe/weights": measured[4]}
  resumed = _run(folder, tmp_path / "cut", second)
  assert second.calls == 4
  assert _measured(tmp_path / "cut") == measured
  assert (resumed.before, resumed.after) == (whole.before, whole.after)
  assert resumed.examples_before == [{"call": 1}]


def test_a_finished_run_measures_nothing_again(folder, tmp_path):
  done = _run(folder, tmp_path, Probe(100))
  probe = Probe(100)
  again = _run(folder, tmp_path, probe)
  assert probe.calls == 0
  assert (again.before, again.after) == (done.before, done.after)
