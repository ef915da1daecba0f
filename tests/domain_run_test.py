"""Runs that merge several teachers: config, checks, lines, figures, resume."""

import json
import shutil

import jax
import pytest

from opd_jax import cli, parsing, preflight
from opd_jax import setup as setup_lib
from opd_jax import train as train_lib
from opd_jax.config import RunConfig
from opd_jax.errors import InputError
from opd_jax.sharding import make_mesh
from tests import pair


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A pair, a wider second teacher with padded rows, and two sources."""
  folder = pair.write_pair(tmp_path_factory.mktemp("merge"))
  (folder / "second").mkdir()
  pair.write_model(folder / "second", layers=1, seed=2, vocab_size=40, width=32)
  pair.write_tokenizer(folder / "second")
  shutil.copy(folder / "held_out.jsonl", folder / "code.jsonl")
  return folder


@pytest.fixture
def one_device(monkeypatch):
  monkeypatch.setattr(
    setup_lib, "make_mesh", lambda sizes: make_mesh({}, jax.devices()[:1])
  )


def values_of(folder, **changes):
  values = pair.config_of(folder, **{"held_out": {}, "steps": 4, **changes})
  for name in ("code", "more"):
    path = str(folder / "code.jsonl")
    values["data"]["sources"][name] = {"path": path}
  second = {"path": str(folder / "second")}
  values.setdefault("domain_teachers", {"code": second, "more": second})
  return values


def config_of(folder, **changes):
  return parsing.parse(RunConfig, values_of(folder, **changes))


def records(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  found = [json.loads(line) for line in lines]
  return [record for record in found if "train/loss" in record]


def test_a_key_must_be_a_source(folder):
  teachers = {"maths": {"path": str(folder / "second")}}
  with pytest.raises(
    InputError, match=r"domain_teachers\.maths .* sources are texts, code, more"
  ):
    config_of(folder, domain_teachers=teachers)


def test_the_teacher_must_have_rows(folder):
  second = {"path": str(folder / "second")}
  teachers = dict.fromkeys(("texts", "code", "more"), second)
  with pytest.raises(InputError, match=r"would score no row.*make teacher one"):
    config_of(folder, domain_teachers=teachers)
  # Named twice, it is one model with one set of weights.
  config = config_of(folder, domain_teachers=teachers, teacher=second)
  assert setup_lib.route(config) == ({}, (0, 0, 0))


def test_overrides_reach_it(folder, tmp_path):
  text = f"def get_config():\n  return {values_of(folder)!r}\n"
  (tmp_path / "config.py").write_text(text)
  config = parsing.load(
    RunConfig,
    str(tmp_path / "config.py"),
    ["domain_teachers.code.compute_dtype=bfloat16"],
  )
  assert config.domain_teachers["code"].compute_dtype == "bfloat16"
  roles, routes = setup_lib.route(config)
  assert list(roles) == ["teacher of code", "teacher of more"]
  assert routes == (0, 1, 2)


def test_every_teacher_is_looked_at(folder, tmp_path, one_device):
  """Its ids, its window, its rows; and all that a run says of it."""
  config = config_of(folder)
  setup = setup_lib.prepare(config)
  step = setup_lib.make_step(setup)
  report = preflight.inspect(setup, step)
  assert not report.findings
  figures = report.figures()["vocabulary"]
  assert figures["shared_ids"] == 32
  assert figures["teacher of code, more_masked_rows"] == 8
  lines = "\n".join(train_lib.describe(setup, step))
  assert f"teacher of code, more: {folder}/second (" in lines
  assert "all 2 teachers score all rows" in lines
  assert "teacher of code, more has 40 rows" in lines

  other = tmp_path / "other"
  shutil.copytree(folder / "second", other)
  pair.write_tokenizer(other, "bacdefghijklmnopqrstuvwxyz .,")
  setup = setup_lib.prepare(
    config_of(folder, domain_teachers={"code": {"path": str(other)}})
  )
  assert setup.teacher_tokenizer_of("code").path == other
  assert setup.teacher_tokenizer_of("more") is setup.teacher_tokenizer
  report = preflight.inspect(setup, setup_lib.make_step(setup))
  (found,) = (
    found for found in report.findings if found.name == "tokenizers_differ"
  )
  assert f"teacher of code {other}" in found.message

  file = other / "config.json"
  content = json.loads(file.read_text())
  file.write_text(json.dumps({**content, "max_position_embeddings": 12}))
  with pytest.raises(InputError, match="the teacher of code's window of 12"):
    setup_lib.prepare(
      config_of(folder, domain_teachers={"code": {"path": str(other)}})
    )


def test_a_store_may_have_the_tokenizer_of_its_own_teacher(folder, tmp_path):
  other = tmp_path / "other"
  shutil.copytree(folder / "second", other)
  pair.write_tokenizer(other, "abcdefghijklmnopqrstuvwzyx .,")
  store = tmp_path / "store.parquet"
  flags = ["--prompt={text}", "--max_new_tokens=6", f"--out={store}"]
  flags += [f"--model={other}", f"--data={folder}/code.jsonl"]
  assert cli.main(["generate", *flags]) == 0

  def prepare(source):
    values = values_of(
      folder,
      domain_teachers={"code": {"path": str(other)}},
      rollout={"stored_fraction": 0.5},
    )
    values["data"]["max_prompt_tokens"] = 32
    values["data"]["sources"][source] |= {"path": str(store), "given": True}
    return setup_lib.prepare(parsing.parse(RunConfig, values))

  assert prepare("code").origins["code"].model == str(other)
  with pytest.raises(InputError, match="holds ids of another tokenizer"):
    prepare("more")


def test_weights_are_shared(folder, one_device):
  """The reference is one of the teachers."""
  config = config_of(
    folder,
    objective={"name": "exopd"},
    reference={"path": str(folder / "second")},
  )
  scorer = setup_lib.make_step(setup_lib.prepare(config)).scorer
  frozen = train_lib.load_frozen(config, scorer)
  first, second = frozen["teacher"]
  assert first is not second
  assert frozen["reference"] is second


def test_a_run_goes_on_and_tells_of_each_source(folder, one_device, tmp_path):
  """2 and 2 more steps are 4, to the byte; three sources have figures."""
  whole = train_lib.train(config_of(folder), tmp_path / "whole")
  assert whole.finished
  for steps in (2, 4):
    train_lib.train(config_of(folder, steps=steps), tmp_path / "resumed")
  one, two = (
    (tmp_path / name / "export" / "model.safetensors").read_bytes()
    for name in ("whole", "resumed")
  )
  assert one == two
  found = records(tmp_path / "whole")
  assert [record["train/loss"] for record in found] == [
    record["train/loss"] for record in records(tmp_path / "resumed")
  ]
  names = [f"teacher/kl/{name}" for name in ("texts", "code", "more")]
  # A batch of 4 prompts need not have every source.
  seen = [name for record in found for name in names if name in record]
  assert set(seen) == set(names)
  assert all(record["teacher/masked_mass"] > 0 for record in found)

  # The second teacher alone: another run.
  second = {"path": str(folder / "second")}
  config = config_of(folder, teacher=second, domain_teachers={})
  train_lib.train(config, tmp_path / "alone")
  (losses, others) = (
    [record["train/loss"] for record in records(tmp_path / name)]
    for name in ("whole", "alone")
  )
  assert abs(losses[0] - others[0]) > 1e-3


def test_the_teacher_that_is_evaluated(folder, one_device, monkeypatch):
  """It is `teacher`, with its own weights, whatever others there are."""
  source = {"path": str(folder / "held_out.jsonl"), "answer": "{text}"}
  found = []
  for changes in ({}, {"domain_teachers": {}}):
    config = config_of(
      folder,
      eval={"source": source, "verifier": "exact", "teacher": True, "seed": 3},
      **changes,
    )
    setup = setup_lib.prepare(config)
    step = setup_lib.make_step(setup)
    task = train_lib.Distillation(setup, step, preflight.inspect(setup, step))
    frozen = train_lib.load_frozen(config, step.scorer)
    monkeypatch.setattr(task, "_frozen", frozen)
    found.append(task.baseline())
  merged, single = found
  assert merged == single
  assert merged["teacher/length_mean"] > 1
