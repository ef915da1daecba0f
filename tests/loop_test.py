"""The loop: when it measures, and what of it survives an interruption."""

import json
import signal

import jax
import jax.numpy as jnp
import pytest

from opd_jax import interrupts, loop, saved, sft
from opd_jax.checkpoint import Checkpoints
from opd_jax.config import SftConfig
from opd_jax.errors import InputError
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


def _run(folder, workdir, *probes, stop_at=None):
  """Measures at 0, every so many steps, at checkpoints (4) and at the end."""
  values = pair.sft_config_of(
    folder, steps=10, held_out={}, checkpoint={"every": 4}
  )
  setup = sft.prepare(parse(SftConfig, values))
  mesh = make_mesh({}, jax.devices()[:1])
  task = sft.FineTuning(setup, sft.make_step(setup, mesh))
  with pytest.MonkeyPatch.context() as patch:
    if stop_at is not None:

      def stop(interrupts, step):
        interrupts.signal = signal.SIGTERM if step == stop_at else None
        return interrupts.signal is not None

      patch.setattr(interrupts.Interrupts, "stop", stop)
    return loop.run(
      task, setup.examples, workdir, measurements=probes, began=0.0
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


class Accuracy(Probe):
  """An accuracy that is highest at the fourth call."""

  def __call__(self, params):
    super().__call__(params)
    accuracy = 0.9 - 0.1 * abs(self.calls - 4)
    names = ("accuracy", "accuracy_low", "accuracy_high")
    return {f"eval/{name}": accuracy for name in names}


def test_the_best_is_kept_between_checkpoints(folder, tmp_path):
  """Measured at 0, 3, 4, 6, 8, 9, 10; checkpoints are due at 4, 8, 10."""
  _run(folder, tmp_path, Accuracy(3))
  checkpoints = Checkpoints(tmp_path / loop.CHECKPOINT_FOLDER, None)
  assert checkpoints.best() == 6
  assert checkpoints.latest() == 10
  checkpoints.close()


class Failing(Probe):
  """Like a verifier that cannot bear a completion."""

  def __call__(self, params):
    if self.calls == 3:
      raise InputError("cannot bear it")
    return super().__call__(params)


def test_a_measurement_that_fails_loses_no_step(folder, tmp_path):
  whole = _run(folder, tmp_path / "whole", Probe(3))
  with pytest.raises(InputError, match="cannot bear it"):
    _run(folder, tmp_path / "cut", Failing(3))
  checkpoints = Checkpoints(tmp_path / "cut" / loop.CHECKPOINT_FOLDER, None)
  assert checkpoints.latest() == 6
  checkpoints.close()
  mended = _run(folder, tmp_path / "cut", Probe(3))
  assert mended.after == whole.after


def test_what_was_measured_before_a_failure_is_heard(
  folder, tmp_path, monkeypatch
):
  """The checkpoint of step 6 has heard it; a resumed run measures it never."""
  heard = []
  monkeypatch.setattr(
    sft.FineTuning, "observe", lambda self, step, values: heard.append(step)
  )
  with pytest.raises(InputError, match="cannot bear it"):
    _run(folder, tmp_path, Probe(3), Failing(3))
  assert heard == [0, 0, 3, 3, 4, 4, 6]


def test_seconds_are_of_the_whole_run(folder, tmp_path):
  stopped = _run(folder, tmp_path, Probe(100), stop_at=5)
  resumed = _run(folder, tmp_path, Probe(100))
  assert resumed.compile_seconds > stopped.compile_seconds > 0
  again = _run(folder, tmp_path, Probe(100))
  assert again.compile_seconds == resumed.compile_seconds


def test_what_is_told_is_no_markup(folder, tmp_path, monkeypatch, capfd):
  """Templates of chat models hold tags in brackets."""
  told = "prompt [INST] 1+1? [/INST] [bold]"
  monkeypatch.setattr(sft.FineTuning, "describe", lambda self: [told])
  _run(folder, tmp_path, Probe(100))
  assert told in capfd.readouterr().err


def test_a_run_is_found_from_another_folder(folder, tmp_path, monkeypatch):
  monkeypatch.chdir(folder)
  values = pair.sft_config_of(folder, steps=1, held_out={})
  values["student"] = {**values["student"], "path": "student"}
  setup = sft.prepare(parse(SftConfig, values))
  mesh = make_mesh({}, jax.devices()[:1])
  task = sft.FineTuning(setup, sft.make_step(setup, mesh))
  loop.run(task, setup.examples, tmp_path / "run", began=0.0)
  monkeypatch.chdir(tmp_path)
  found = saved.find_run("run")
  assert found.source == str(folder / "student")
  assert found.architecture == setup.student


def test_a_run_must_measure_what_it_measured(folder, tmp_path):
  def start(steps, **changes):
    values = pair.sft_config_of(folder, steps=steps, held_out={}, **changes)
    setup = sft.prepare(parse(SftConfig, values))
    mesh = make_mesh({}, jax.devices()[:1])
    task = sft.FineTuning(setup, sft.make_step(setup, mesh))
    return loop.run(task, setup.examples, tmp_path, began=0.0)

  start(1)
  start(2, eval={"every": 7})
  with pytest.raises(InputError, match=r"eval.samples: 4 saved, 2 given"):
    start(3, eval={"samples": 2})
