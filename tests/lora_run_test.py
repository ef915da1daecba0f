"""Runs that train adapters: resume, export, and what is loaded from them."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from opd_jax import cli, parsing, saved
from opd_jax import setup as setup_lib
from opd_jax import sft as sft_lib
from opd_jax import train as train_lib
from opd_jax.config import RunConfig, SftConfig
from opd_jax.errors import InputError
from opd_jax.export import export_adapter
from opd_jax.models import Model, hf, lora, peft
from opd_jax.sharding import make_mesh
from tests import pair
from tests.lora_test import lora_of, spread
from tests.models import tiny

LORA = {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "o_proj", "down_proj"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return pair.write_examples(pair.write_pair(tmp_path_factory.mktemp("pair")))


@pytest.fixture(scope="module", autouse=True)
def one_device():
  with pytest.MonkeyPatch.context() as patch:
    for module in (setup_lib, sft_lib):
      patch.setattr(
        module, "make_mesh", lambda sizes: make_mesh({}, jax.devices()[:1])
      )
    yield


def config_of(folder, **changes):
  source = {"path": str(folder / "student"), "lora": LORA}
  changes = {"student": source, "checkpoint": {"every": 2}, **changes}
  changes.setdefault("optimizer", {"learning_rate": 1e-2})
  return parsing.parse(RunConfig, pair.config_of(folder, steps=4, **changes))


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
  """The folder of a run that was interrupted and resumed, and a whole one's."""
  work = tmp_path_factory.mktemp("runs")
  train_lib.train(config_of(folder), work / "whole")
  lines = (work / "whole" / "metrics.jsonl").read_text().splitlines()
  losses = [json.loads(line).get("train/loss") for line in lines]
  losses = [loss for loss in losses if loss is not None]
  assert losses[0] > losses[-1]
  first = dataclasses.replace(config_of(folder), steps=2)
  train_lib.train(first, work / "resumed")
  train_lib.train(config_of(folder), work / "resumed")
  return work


def test_resuming_changes_no_bit(run):
  whole, resumed = (
    saved.find_run(run / name).restore()[1] for name in ("whole", "resumed")
  )
  assert int(resumed.step) == 4
  jax.tree.map(np.testing.assert_array_equal, whole, resumed)
  one, two = (
    load_file(run / name / "export" / hf.SINGLE_FILE)
    for name in ("whole", "resumed")
  )
  for name, value in one.items():
    np.testing.assert_array_equal(two[name], value)
  # The adapters, their two moments, and nothing of the size of a weight.
  sizes = [leaf.size for leaf in jax.tree.leaves(whole)]
  weights = hf.parameter_count(saved.find_run(run / "whole").architecture)
  assert sum(sizes) < weights


def test_every_form_of_the_student_says_the_same(run, folder, tmp_path):
  """The run, its export, its merged model and its adapter on the base."""
  work = f"--workdir={run / 'whole'}"
  for form in ("merged", "adapter"):
    command = ["export", work, f"--out={tmp_path / form}", f"--format={form}"]
    assert cli.main(command) == 0
  exported, merged = (
    load_file(path / hf.SINGLE_FILE)
    for path in (run / "whole" / "export", tmp_path / "merged")
  )
  for name, value in exported.items():
    np.testing.assert_array_equal(merged[name], value)
  assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
    peft.CONFIG_FILE,
    peft.WEIGHTS_FILE,
  }
  drawn = []
  for path in (run / "whole", tmp_path / "merged", tmp_path / "adapter"):
    found = saved.find(path)
    assert found.architecture == hf.read_config(folder / "student")
    params = found.load(found.decoder("float32", 1, 1))
    drawn.append(jax.device_get(params))
  for other in drawn[1:]:
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), drawn[0], other
    )
  base = load_file(folder / "student" / hf.SINGLE_FILE)
  changed = {
    name for name, value in merged.items() if np.any(value != base[name])
  }
  assert changed == {
    f"model.layers.{layer}.{name}.weight"
    for layer in range(2)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
  }
  with pytest.raises(InputError, match="is an adapter; merge"):
    saved.find(tmp_path / "adapter").fingerprint()


def test_a_run_of_all_weights_has_no_adapter(folder, tmp_path, capsys):
  values = pair.sft_config_of(folder, steps=1, held_out={})
  sft_lib.sft(parsing.parse(SftConfig, values), tmp_path / "run")
  command = ["export", f"--workdir={tmp_path / 'run'}"]
  command += [f"--out={tmp_path / 'out'}", "--format=adapter"]
  assert cli.main(command) != 0
  assert "no adapter to write; take --format" in capsys.readouterr().err
  assert not (tmp_path / "out").exists()


def test_adapters_are_fine_tuned_on_examples(folder, tmp_path):
  source = {"path": str(folder / "student"), "lora": LORA}
  values = pair.sft_config_of(folder, student=source, steps=3)
  summary = sft_lib.sft(parsing.parse(SftConfig, values), tmp_path)
  assert summary.after["held_out/loss"] < summary.before["held_out/loss"]
  found = saved.find(tmp_path)
  params = found.load(found.decoder("float32", 1, 1))
  exported = hf.load(tmp_path / "export", found.decoder("float32", 1, 1))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, exported
  )


def test_the_base_is_the_teacher_and_the_reference(folder):
  """Without its adapters the student is loaded once, for all three."""
  source = {"path": str(folder / "student")}
  config = config_of(
    folder, teacher=source, reference=source, objective={"name": "exopd"}
  )
  setup = setup_lib.prepare(config)
  assert setup.shared == ("teacher", "reference")
  scorer = setup_lib.make_step(setup).scorer
  frozen = train_lib.load_frozen(config, scorer)
  for role in ("teacher", "reference"):
    same = jax.tree.map(lambda a, b: a is b, frozen["base"], frozen[role])
    assert all(jax.tree.leaves(same))
  half = {**source, "compute_dtype": "bfloat16"}
  config = config_of(folder, teacher=half)
  setup = setup_lib.prepare(config)
  assert not setup.shared
  scorer = setup_lib.make_step(setup).scorer
  frozen = train_lib.load_frozen(config, scorer)
  table = frozen["teacher"]["embed"]["embedding"]
  assert table.dtype == "bfloat16"
  assert frozen["base"]["embed"]["embedding"].dtype == "float32"


@pytest.mark.parametrize("name", ["llama_biases", "qwen3_moe"])
def test_written_adapters_come_back(name, tmp_path):
  """Also those that eight devices hold, read by one."""
  config = tiny.CONFIGS[name]
  adapters = lora_of(config)
  model = Model(config, tiny.layout(), lora=adapters)
  trained = spread(model.abstract_trained(), 0, 1.0)
  layout = tiny.layout({"fsdp": 2, "tensor": 2, "expert": 2})
  eight = Model(config, layout, lora=adapters)
  places = jax.tree.map(lambda leaf: leaf.sharding, eight.abstract_trained())
  export_adapter(
    jax.device_put(trained, places), eight, "org/base@main", tmp_path / "a"
  )
  assert peft.read_base(tmp_path / "a") == "org/base@main"
  assert peft.read_lora(tmp_path / "a", config) == adapters
  jax.tree.map(
    np.testing.assert_array_equal, peft.load(tmp_path / "a", model), trained
  )
  query = trained["layers"]["attention"]["query"]["adapter"]["a"]
  found = load_file(tmp_path / "a" / peft.WEIGHTS_FILE)
  stem = "base_model.model.model.layers.1.self_attn.q_proj"
  np.testing.assert_array_equal(found[f"{stem}.lora_A.weight"], query[1].T)


def test_adapters_that_cannot_be_read(tmp_path):
  config = tiny.CONFIGS["llama"]
  model = Model(config, tiny.layout(), lora=lora_of(config))
  export_adapter(
    spread(model.abstract_trained(), 0, 1.0), model, "org/base", tmp_path / "a"
  )
  file = tmp_path / "a" / peft.CONFIG_FILE
  values = json.loads(file.read_text())
  for changes, words in (
    (
      {"use_dora": True},
      r"use_dora = True is not supported.*merge the adapter",
    ),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
    ({"use_more": 3}, "use_more = 3 is not supported, only None"),
    ({"target_modules": ["lm_head"]}, "'lm_head' is none of the products"),
    ({"r": None}, "must have a number r"),
  ):
    file.write_text(json.dumps({**values, **changes}))
    with pytest.raises(InputError, match=words):
      peft.read_lora(tmp_path / "a", config)
  file.write_text(json.dumps({**values, "base_model_name_or_path": None}))
  with pytest.raises(InputError, match="no base_model_name_or_path"):
    peft.read_base(tmp_path / "a")
  weights = tmp_path / "a" / peft.WEIGHTS_FILE
  tensors = load_file(weights)
  name = next(iter(tensors))
  save_file({key: tensors[key] for key in tensors if key != name}, weights)
  with pytest.raises(InputError, match="do not belong together"):
    peft.load(tmp_path / "a", model)
  save_file({key: tensors[key].astype(np.int32) for key in tensors}, weights)
  with pytest.raises(InputError, match=r"is I32, must be one of F32"):
    peft.load(tmp_path / "a", model)
  weights.write_bytes(b"no tensors")
  with pytest.raises(InputError, match="damaged or no safetensors"):
    peft.load(tmp_path / "a", model)
  weights.unlink()
  with pytest.raises(InputError, match="pickled adapters"):
    peft.load(tmp_path / "a", model)


def test_base_and_adapters_are_told_apart():
  config = tiny.CONFIGS["llama"]
  model = Model(config, tiny.layout(), lora=lora_of(config))
  adapters = model.init_adapters(jax.random.key(0))
  whole = lora.combine(tiny.params("llama"), adapters)
  jax.tree.map(np.testing.assert_array_equal, lora.only(whole), adapters)
  assert not lora.only(tiny.params("llama"))
