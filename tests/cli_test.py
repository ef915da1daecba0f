"""The command line: what a user's mistakes, and `--help`, look like.

Every mistake ends with one line on standard error and status 2 before a weight
is read or a program compiled.
"""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from opd_jax import cli, programs
from opd_jax.export import export
from opd_jax.models import Model, ModelConfig, hf
from tests.models import tiny

WORDS = 40
CONFIG_FILE = """\
import json
import pathlib


def get_config(folder):
  return json.loads((pathlib.Path(folder) / "config.json").read_text())
"""


def write_tokenizer(folder, words):
  backend = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(
      {word: index for index, word in enumerate(words)}, unk_token="<unk>"
    )
  )
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  backend.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(
    json.dumps(
      {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "unk_token": "<unk>",
      }
    )
  )


def write_model(folder, words, **fields):
  """A checkpoint of two layers in three files."""
  config = ModelConfig.from_hf(
    {
      "model_type": "llama",
      "vocab_size": len(words),
      "hidden_size": 16,
      "intermediate_size": 16,
      "num_hidden_layers": 2,
      "num_attention_heads": 4,
      "max_position_embeddings": 32,
      **fields,
    }
  )
  random = np.random.default_rng(0)
  model = Model(config, tiny.layout())
  params = {}
  for path, leaf in jax.tree.leaves_with_path(model.abstract_params()):
    node = params
    for key in path[:-1]:
      node = node.setdefault(key.key, {})
    node[path[-1].key] = random.standard_normal(leaf.shape, np.float32)
  export(params, model, None, folder, max_shard_bytes=4000)
  write_tokenizer(folder, words)


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
  """Folder with student/, teacher/, prompts.jsonl, config.json, config.py."""
  folder = tmp_path_factory.mktemp("pair")
  words = ["<unk>", "</s>", *(f"w{index}" for index in range(2, WORDS))]
  write_model(folder / "student", words)
  write_model(folder / "teacher", words, intermediate_size=24)
  (folder / "prompts.jsonl").write_text(
    "".join(
      json.dumps({"text": " ".join(words[2 : 3 + row])}) + "\n"
      for row in range(1, 9)
    )
  )
  (folder / "config.py").write_text(CONFIG_FILE)
  return folder


@pytest.fixture
def run(pair, tmp_path):
  """A copy of the pair, to damage, with a config.json of its own."""
  folder = tmp_path / "run"
  shutil.copytree(pair, folder)
  config = {
    "student": {"path": f"{folder}/student"},
    "teacher": {"path": f"{folder}/teacher"},
    "data": {"path": f"{folder}/prompts.jsonl", "max_prompt_tokens": 8},
    "sampling": {"max_new_tokens": 4},
    "batch": {"prompts": 8},
    "objective": {"name": "gkd"},
    "log": {"time_split_every": None},
    "steps": 1,
  }
  (folder / "config.json").write_text(json.dumps(config))
  return folder


def arguments_of(run, *overrides):
  return [
    "train",
    f"--config={run}/config.py:{run}",
    f"--workdir={run}/out",
    *(f"--config.{override}" for override in overrides),
  ]


@pytest.fixture
def refused(monkeypatch, capfd):
  """Runs a command that must be refused; returns its one line."""

  def device_work(*arguments, **options):
    pytest.fail("reached the devices")

  def refuse(arguments):
    with monkeypatch.context() as patch:
      patch.setattr(hf, "load", device_work)
      patch.setattr(programs.Programs, "compile", device_work)
      assert cli.main(arguments) == 2
    out, err = capfd.readouterr()
    lines = err.splitlines()
    # What a run is about to do may come first: the config was good so far.
    assert [line for line in lines if line.startswith("opd-jax: error: ")] == (
      lines[-1:]
    )
    assert "Traceback" not in err
    assert not out
    return lines[-1].removeprefix("opd-jax: error: ")

  return refuse


# Overrides of a good config, and what the message must say.
BAD_CONFIGS = {
  "unknown key": (["optimizer.learning_rat=1"], ["optimizer.learning_rate?"]),
  "key far from any": (["xyzzy=1"], ["xyzzy; known keys: batch, "]),
  "no value": (["steps"], ["--config.steps has no value"]),
  "wrong type": (["steps=many"], ["steps must be int, got 'many'"]),
  "no group": (["steps.more=1"], ["steps is not a group"]),
  "unknown objective": (
    ["objective.name=gdk"],
    ["'gdk'", "known: ", "Did you mean 'gkd'?"],
  ),
  "unknown objective option": (
    ["objective.bet=1"],
    ["objective.bet;", "objective.beta?"],
  ),
  "objective option out of range": (
    ["objective.beta=1.5"],
    ["objective gkd: beta", "[0, 1]", "1.5"],
  ),
  "no such model": (["student.path=nowhere"], ["'nowhere'", "give a folder"]),
  "no such data": (["data.path=nowhere"], ["nowhere", "JSONL"]),
  "no such field": (
    ["data.field=prompt"],
    ["line 1", "no field 'prompt'", "the row has text", "data.field"],
  ),
  "prompt too long": (
    ["data.max_prompt_tokens=5", "data.overlong=error"],
    ["line 5", "6 tokens", "max_prompt_tokens is 5", "truncate_left"],
  ),
  "window too long": (
    ["sampling.max_new_tokens=30"],
    ["8 + 30 = 38", "student's window of 32", "lower"],
  ),
  "top_k": (["sampling.top_k=41"], ["top_k", "[1, V=40]", "41", "None"]),
  "stop id": (
    ["sampling.stop_ids=(40,)"],
    ["stop id 40", "[0, V=40)", "sampling.stop_ids"],
  ),
  "mesh too large": (["mesh.tensor=16"], ["tensor=16", "8 devices", "-1"]),
  "mesh against heads": (
    ["mesh.tensor=8"],
    ["student: heads = 4", "8 shards", "choose mesh sizes"],
  ),
  "batch against mesh": (
    ["batch.prompts=4"],
    ["batch.prompts = 4", "8 shards", "change batch.prompts"],
  ),
  "micro-batch against mesh": (
    ["batch.micro_batches=2"],
    ["micro-batch = 4", "8 shards", "batch.micro_batches"],
  ),
  "micro-batches": (
    ["batch.micro_batches=3"],
    ["batch.micro_batches=3", "8 rows", "divisor"],
  ),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_bad_config_is_refused(case, run, refused):
  overrides, parts = BAD_CONFIGS[case]
  line = refused(arguments_of(run, *overrides))
  assert all(part in line for part in parts), line
  assert not (run / "out").exists()


def missing_shard(run):
  file = sorted((run / "student").glob("model-*.safetensors"))[1]
  file.unlink()
  return [file.name, "model.safetensors.index.json", "download complete?"]


def wrong_shape(run):
  file = sorted((run / "teacher").glob("model-*.safetensors"))[-1]
  tensors = load_file(file)
  name = next(name for name in tensors if tensors[name].ndim == 2)
  shape = tensors[name].shape
  save_file({**tensors, name: tensors[name][:-1]}, file)
  found = (shape[0] - 1, shape[1])
  return [name, f"shape {found}", f"asks for {shape}", "together", "teacher"]


def cut_file(run):
  file = sorted((run / "student").glob("model-*.safetensors"))[0]
  file.write_bytes(file.read_bytes()[:100])
  return [file.name, "damaged", "download it again"]


def pickles_only(run):
  for file in (run / "student").glob("model*"):
    file.unlink()
  (run / "student" / "pytorch_model.bin").touch()
  return ["pytorch_model.bin", "pickle", "save_pretrained"]


def other_tokenizer(run):
  words = ["<unk>", "</s>", *(f"w{index}" for index in range(2, WORDS))]
  words[7], words[9] = words[9], words[7]
  write_tokenizer(run / "teacher", words)
  return ["differ in 2 of 40 ids", "7: 'w7' / 'w9'", "9: 'w9' / 'w7'", "choose"]


def no_tokenizer(run):
  (run / "student" / "tokenizer.json").unlink()
  return ["no tokenizer", "tokenizer.json", "copy"]


def rope_type(run):
  change_model(run, rope_scaling={"rope_type": "dynamic", "factor": 2.0})
  return ["student: ", "'dynamic'", "supported: default, linear"]


def hidden_act(run):
  change_model(run, hidden_act="gelu")
  return ["student: ", "hidden_act = 'gelu'", "supported: 'silu'"]


def unknown_field(run):
  change_model(run, logit_softcap=30.0)
  return ["student: ", "logit_softcap = 30.0", "remove it"]


def change_model(run, **fields):
  file = run / "student" / "config.json"
  file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def empty_data(run):
  (run / "prompts.jsonl").write_text("\n")
  return ["prompts.jsonl", "no rows", "one object a line"]


def malformed_row(run):
  with (run / "prompts.jsonl").open("a") as file:
    file.write('{"text": "w2"\n')
  return ["prompts.jsonl, line 9", "not valid JSON", "every line"]


def no_get_config(run):
  (run / "config.py").write_text("config = {}\n")
  return ["config.py", "get_config"]


def no_config_file(run):
  (run / "config.py").unlink()
  return ["config.py", "no config file", "get_config"]


def workdir_is_a_file(run):
  (run / "out").touch()
  return ["--workdir=", "out is a file", "name another path"]


@pytest.mark.parametrize(
  "damage",
  [
    missing_shard,
    wrong_shape,
    cut_file,
    pickles_only,
    other_tokenizer,
    no_tokenizer,
    rope_type,
    hidden_act,
    unknown_field,
    empty_data,
    malformed_row,
    no_get_config,
    no_config_file,
    workdir_is_a_file,
  ],
)
def test_a_bad_file_is_refused(damage, run, refused):
  parts = damage(run)
  line = refused(arguments_of(run))
  assert all(part in line for part in parts), line


@pytest.mark.parametrize(
  ("arguments", "parts"),
  [
    (["tarin"], ["'tarin'", "train, generate, export"]),
    (["train"], ["--config and --workdir", "opd-jax train --help"]),
    (["train", "--config=a.py"], ["needs --workdir"]),
    (["train", "--wrokdir=x"], ["'wrokdir'", "workdir"]),
    (["train", "x"], ["'x'", "--flag=value"]),
    (["generate", "--prompt=x"], ["needs --model"]),
    (["generate", "--dtype=float16"], ["float16", "float32|bfloat16"]),
    (["export", "--workdir=nowhere", "--out=new"], ["nowhere", "workdir"]),
    (["export", "--workdir=nowhere", "--out=tests"], ["tests", "another"]),
    (["export", f"--out={__file__}", "--workdir=x"], [__file__, "is a file"]),
  ],
)
def test_a_bad_command_is_refused(arguments, parts, refused):
  line = refused(arguments)
  assert all(part in line for part in parts), line


def test_an_empty_prompt_is_refused(pair, refused):
  line = refused(["generate", f"--model={pair}/student", "--prompt="])
  assert "prompt '' has no token; write some text" in line


def test_a_run_its_export_and_another_run_in_its_folder(
  run, refused, capfd, tmp_path
):
  assert cli.main(arguments_of(run)) == 0
  assert f"checkpoint: {run}/out/export\n" in capfd.readouterr().out
  out = tmp_path / "exported"
  export_command = ["export", f"--workdir={run}/out", f"--out={out}"]
  assert cli.main(export_command) == 0
  assert capfd.readouterr().out == f"wrote step 1 to {out}\n"
  got, want = (
    {
      name: value
      for file in folder.glob("*.safetensors")
      for name, value in load_file(file).items()
    }
    for folder in (out, run / "out" / "export")
  )
  assert got.keys() == want.keys()
  for name, value in want.items():
    np.testing.assert_array_equal(got[name], value)

  line = refused(export_command)
  assert "not an empty folder; name another" in line
  elsewhere = [*export_command[:-1], f"--out={tmp_path}/new"]
  line = refused([*elsewhere, "--step=best"])
  assert "eval.path" in line
  line = refused([*elsewhere, "--step=7"])
  assert "step 7 in" in line
  assert "steps there: 1" in line
  line = refused([*elsewhere, "--step=-1"])
  assert "latest, best or a number, got '-1'" in line
  line = refused(arguments_of(run, "seed=3", "sampling.top_k=4", "steps=9"))
  assert "seed: 0 saved, 3 given" in line
  assert "sampling.top_k: None saved, 4 given" in line
  assert "steps" not in line.partition("another run")[2]
  assert "new workdir" in line


def test_importing_the_command_line_loads_nothing_heavy():
  script = (
    "import opd_jax.cli, sys; "
    "print([name for name in ('jax', 'transformers', 'flax', 'numpy') "
    "if name in sys.modules])"
  )
  result = subprocess.run(
    [sys.executable, "-c", script], capture_output=True, text=True, check=True
  )
  assert result.stdout == "[]\n"


@pytest.mark.parametrize("command", ["train", "generate", "export"])
def test_help_is_short_and_free_of_paths(command, capfd):
  assert cli.main([command, "--help"]) == 0
  out, err = capfd.readouterr()
  assert not err
  assert out.startswith(f"usage: opd-jax {command} --")
  assert all(len(line) < 80 for line in out.splitlines())
  assert not any(word in out for word in ("None", ".py:\n", "absl"))
  assert cli.main([]) == 0
  assert f"\n  {command} " in capfd.readouterr().out
