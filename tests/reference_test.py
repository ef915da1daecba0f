"""Runs with a third, frozen model: refused, loaded, shared and repeated."""

import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from opd_jax import flops, parsing, preflight
from opd_jax import setup as setup_lib
from opd_jax import train as train_lib
from opd_jax.config import RunConfig
from opd_jax.errors import InputError
from opd_jax.programs import Programs
from opd_jax.sharding import make_mesh
from tests import engine, pair

EXOPD = {"name": "exopd"}
CLOCKED = ("time/", "train/tokens_per_second", "train/tflops_per_device")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = pair.write_pair(tmp_path_factory.mktemp("trio"))
  (folder / "reference").mkdir()
  pair.write_model(folder / "reference", layers=1, seed=2, vocab_size=40)
  pair.write_tokenizer(folder / "reference")
  return folder


@pytest.fixture
def one_device(monkeypatch):
  monkeypatch.setattr(
    setup_lib, "make_mesh", lambda sizes: make_mesh({}, jax.devices()[:1])
  )


def _config(folder, role="reference", **changes):
  """A run whose reference is the folder of a role, None for none."""
  values = pair.config_of(
    folder, **{"objective": EXOPD, "held_out": {}, **changes}
  )
  if role is not None:
    values["reference"] = {"path": str(folder / role)}
  return parsing.parse(RunConfig, values)


def _records(workdir):
  return [
    {
      name: value
      for name, value in json.loads(line).items()
      if not name.startswith(CLOCKED)
    }
    for line in (workdir / "metrics.jsonl").read_text().splitlines()
  ]


@pytest.mark.parametrize(
  ("role", "objective", "named"),
  [
    (
      None,
      EXOPD,
      r"exopd .* needs a reference model.*student starts from .*st",
    ),
    (None, {"name": "gopd", "lam": 0.5}, "gopd .* needs a reference model"),
    ("reference", {"name": "gopd"}, "reads no reference model, which would"),
    ("reference", {"name": "gkd"}, "set reference to None, or choose an obj"),
  ],
)
def test_it_is_named_where_it_is_needed_and_nowhere_else(
  folder, role, objective, named
):
  with pytest.raises(InputError, match=named):
    setup_lib.prepare(_config(folder, role, objective=objective))


def test_its_window_must_hold_the_rows(folder, tmp_path):
  short = tmp_path / "short"
  shutil.copytree(folder / "reference", short)
  file = short / "config.json"
  values = json.loads(file.read_text())
  file.write_text(json.dumps({**values, "max_position_embeddings": 12}))
  with pytest.raises(InputError, match="exceeds the reference's window of 12"):
    setup_lib.prepare(_config(folder, short))


def test_its_rows_bound_the_shared_ids(folder, tmp_path):
  small = tmp_path / "small"
  small.mkdir()
  pair.write_model(small, layers=1, seed=2, vocab_size=31)
  pair.write_tokenizer(small)
  assert setup_lib.prepare(_config(folder)).vocab_size == 32
  assert setup_lib.prepare(_config(folder, small)).vocab_size == 31


def test_its_tokenizer_is_compared_with_the_students(
  folder, tmp_path, one_device
):
  other = tmp_path / "other"
  shutil.copytree(folder / "reference", other)
  pair.write_tokenizer(other, "bacdefghijklmnopqrstuvwxyz .,")
  setup = setup_lib.prepare(_config(folder, other))
  report = preflight.inspect(setup, setup_lib.make_step(setup))
  (found,) = (
    found for found in report.findings if found.name == "tokenizers_differ"
  )
  for words in (
    f"reference {other}",
    "differ in 2 of 32",
    "choose a reference",
  ):
    assert words in found.message
  section = report.figures()["vocabulary"]
  assert section["reference_rows"] == 40
  assert section["reference_masked_rows"] == 8


def test_the_same_checkpoint_is_loaded_once(folder, one_device):
  config = _config(folder, "teacher")
  setup = setup_lib.prepare(config)
  scorer = setup_lib.make_step(setup).scorer
  frozen = train_lib.load_frozen(config, scorer)
  pairs = jax.tree.map(
    lambda one, other: one is other, frozen["teacher"], frozen["reference"]
  )
  assert all(jax.tree.leaves(pairs))
  other = _config(folder, "student")
  scorer = setup_lib.make_step(setup_lib.prepare(other)).scorer
  frozen = train_lib.load_frozen(other, scorer)
  one, two = (
    frozen[role]["embed"]["embedding"] for role in ("teacher", "reference")
  )
  assert np.any(np.asarray(one) != np.asarray(two))


def test_a_run_stopped_and_resumed_split_and_whole(
  folder, one_device, monkeypatch, tmp_path
):
  """Stopped after step 2 of 4; then the same run in two programs a step."""
  whole = train_lib.train(_config(folder, steps=4), tmp_path / "whole")
  assert whole.finished
  run, calls = Programs.__call__, []

  def terminated(self, *arguments):
    calls.append(None)
    if len(calls) == 2:
      os.kill(os.getpid(), signal.SIGTERM)
    return run(self, *arguments)

  with monkeypatch.context() as patch:
    patch.setattr(Programs, "__call__", terminated)
    stopped = train_lib.train(_config(folder, steps=4), tmp_path / "resumed")
  assert stopped.step == 2
  train_lib.train(_config(folder, steps=4), tmp_path / "resumed")
  expected = _records(tmp_path / "whole")
  assert _records(tmp_path / "resumed") == expected
  name = "export/model.safetensors"
  assert (tmp_path / "resumed" / name).read_bytes() == (
    tmp_path / "whole" / name
  ).read_bytes()
  train_lib.train(_config(folder, steps=4, mode="split"), tmp_path / "split")
  for record, found in zip(expected, _records(tmp_path / "split"), strict=True):
    assert record.keys() == found.keys()
    for key, value in record.items():
      np.testing.assert_allclose(found[key], value, atol=1e-5, rtol=1e-4)
  steps = [record for record in expected if "train/loss" in record]
  assert {"reference/entropy", "objective/weight"} <= steps[0].keys()
  assert any(record.get("reference/masked_mass", 0) > 0 for record in steps)


def test_its_operations_are_counted():
  counts = {
    "prompts": 4,
    "rows": 8,
    "prompt_length": 6,
    "completion_length": 7,
    "frozen_prompt_length": 20,
  }
  without = flops.step(engine.STUDENT, (engine.TEACHER,), **counts)
  whole = flops.step(
    engine.STUDENT, (engine.TEACHER,), **counts, reference=engine.REFERENCE
  )
  # One forward over the student's prompts and the completions.
  assert whole - without == flops.forward(engine.REFERENCE, 8 * 13, 6.5, 8 * 7)


def test_operations_of_several_passes_and_of_a_second_decoder_are_counted():
  counts = {
    "prompts": 4,
    "rows": 8,
    "prompt_length": 6,
    "completion_length": 7,
  }

  def count(**options):
    return flops.step(engine.STUDENT, (engine.TEACHER,), **counts, **options)

  student, teacher = (
    flops.forward(model, 8 * 13, 6.5, 8 * 7)
    for model in (engine.STUDENT, engine.TEACHER)
  )
  once = count()
  assert count(epochs=3) - once == 2 * (3 * student + teacher)
  assert count(epochs=3, start=True) - count(epochs=3) == student
  # Prompts are run once each, completions token by token.
  drawn = flops.forward(engine.TEACHER, 4 * 6, 3, 4)
  drawn += flops.forward(engine.TEACHER, 8 * 7, 6 + 3.5, 8 * 7)
  assert count(mixed=engine.TEACHER) - once == drawn


def test_given_tokens_are_not_drawn():
  """8 rows of 7 tokens, 5 of them given: 16 are drawn, and 56 scored."""
  counts = {
    "prompts": 4,
    "rows": 8,
    "prompt_length": 6,
    "completion_length": 7,
  }

  def count(**options):
    return flops.step(engine.STUDENT, (engine.TEACHER,), **counts, **options)

  def drawn(context, tokens):
    return flops.forward(engine.STUDENT, tokens, context, tokens)

  # Whole rows: a row that is drawn is drawn from its prompt on.
  less = drawn(6 + 3.5, 56) - drawn(6 + 3.5, 16)
  np.testing.assert_allclose(count() - count(given_length=5), less)
  # Prefixes: each row is filled with its own, and drawn behind it.
  fill = flops.forward(engine.STUDENT, 8 * 11, 5.5, 8)
  fill -= flops.forward(engine.STUDENT, 4 * 6, 3, 4)
  less = drawn(6 + 3.5, 56) - drawn(11 + 1, 16) - fill
  prefixed = count(given_length=5, prefixes=True)
  np.testing.assert_allclose(count() - prefixed, less)
