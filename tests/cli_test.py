"""The command line: what a user's mistakes, and `--help`, look like.

Every mistake ends with one line on standard error and status 2 before a weight
is read or a program compiled.
"""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from opd_jax import cli, programs
from opd_jax.cli import flags
from opd_jax.config import SourceConfig
from opd_jax.data import sources
from opd_jax.models import hf
from tests import pair

CONFIG_FILE = """\
import json
import pathlib


def get_config(folder):
  return json.loads((pathlib.Path(folder) / "config.json").read_text())
"""


@pytest.fixture(scope="session")
def good(tmp_path_factory):
  return pair.write_pair(tmp_path_factory.mktemp("good"))


@pytest.fixture
def run(good, tmp_path):
  """A pair to damage, and a config of it."""
  folder = tmp_path / "run"
  shutil.copytree(good, folder)
  (folder / "config.py").write_text(CONFIG_FILE)
  values = pair.config_of(folder, batch={"prompts": 8}, held_out={}, steps=1)
  (folder / "config.json").write_text(json.dumps(values))
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
  "estimator that is no loss": (
    ["objective={'name': 'opd_k2', 'estimator': 'k1'}"],
    ["objective opd_k2: ", "'k1' cannot be a loss", "gradient of k1 is 0"],
  ),
  "filter without a correction": (
    ["objective.name=opd_k2", "sampling.top_p=0.9"],
    ["objective opd_k2", "whole distribution", "top_p = 0.9", "take opd_k1"],
  ),
  "filter with an option that needs none": (
    ["objective={'name': 'gopd', 'max_weight': None}", "sampling.min_p=0.1"],
    ["objective gopd", "min_p = 0.1", "set objective.max_weight"],
  ),
  "likeliest tokens as draws": (
    ["objective.name=opd_k1", "sampling.temperature=0"],
    ["sampling.temperature = 0", "objective opd_k1", "such as gkd"],
  ),
  "likeliest tokens as a group": (
    [
      "objective.name=grpo",
      "reward.verifier=exact",
      "data.sources.texts.answer={text}",
      "batch.rollouts=2",
      "sampling.temperature=0",
    ],
    ["sampling.temperature = 0", "objective grpo", "set it > 0"],
  ),
  "updates with a divergence from the reference": (
    [
      "objective={'name': 'grpo', 'kl': 0.1}",
      "reward.verifier=exact",
      "batch.epochs=2",
    ],
    ["objective grpo", "1 x 2", "or set objective.kl to 0"],
  ),
  "teachers that nothing reads": (
    [
      "objective.name=constant_negative_advantage",
      "data.sources.more={'path': 'nowhere.jsonl'}",
      "domain_teachers={'more': {'path': 'nowhere'}}",
    ],
    ["domain_teachers names teachers for more", "reads none", "leave them out"],
  ),
  "mixture without a correction": (
    ["objective.name=opd_k2", "rollout.teacher_mix=0.2"],
    ["objective opd_k2", "rollout.teacher_mix = 0.2", "or take opd_k1 or min"],
  ),
  "mixture of nothing drawn": (
    ["sampling.temperature=0", "rollout.teacher_mix=0.2"],
    ["rollout.teacher_mix = 0.2", "sampling.temperature > 0"],
  ),
  "mixture with the teacher's prompts": (
    [
      "data.sources.texts.teacher_prompt={'text': 'Go! {text}'}",
      "rollout.teacher_mix=0.2",
    ],
    ["rollout.teacher_mix = 0.2", "teacher_prompt", "leave out one"],
  ),
  "all of the teacher": (
    ["rollout.teacher_mix=1.0"],
    ["rollout.teacher_mix must be in [0, 1), got 1.0"],
  ),
  "updates of a student that has moved": (
    ["objective.name=opd_k2", "batch.epochs=2"],
    ["objective opd_k2", "1 x 2", "take opd_k1"],
  ),
  "mini-batches that cut a prompt's rollouts": (
    ["batch.mini_batches=3"],
    ["batch.mini_batches=3 does not divide batch.prompts=8", "together"],
  ),
  "micro-batches of a mini-batch": (
    ["batch.mini_batches=2", "batch.micro_batches=8"],
    ["batch.micro_batches=8", "the 4 rows of an update"],
  ),
  "support without a size": (
    ["objective={'name': 'gkd', 'support': 'union'}"],
    ["objective gkd: ", "support 'union' needs top_k"],
  ),
  "support of more ids than there are": (
    ["objective={'name': 'eopd', 'top_k': 33}"],
    ["objective eopd: ", "top_k", "[1, V=32]", "33"],
  ),
  "no such model": (["student.path=nowhere"], ["'nowhere'", "give a folder"]),
  "no such data": (
    ["data.sources.texts.path=nowhere"],
    ["'nowhere'", "FILE.jsonl", "FILE.parquet", "tfds:NAME", "arith"],
  ),
  "no such file": (
    ["data.sources.texts.path=nowhere.jsonl"],
    ["nowhere.jsonl", "one object a line"],
  ),
  "no such dataset": (
    ["data.sources.texts.path=tfds:nowhere"],
    ["'nowhere'", "catalogue", "options.data_dir", "opd-jax dataset"],
  ),
  "split of a file": (
    ["data.sources.texts.split=test"],
    ["texts.jsonl is a file", "'test'", "leave out"],
  ),
  "no chat template": (
    ["data.sources.texts.prompt.chat=True"],
    ["student has no chat template", "prompt.chat", "chat_template.jinja"],
  ),
  "no chat template of the teacher": (
    ["data.sources.texts.teacher_prompt={'chat': True}"],
    ["teacher has no chat template", "prompt.chat"],
  ),
  "no such field for the teacher": (
    ["data.sources.texts.teacher_prompt={'text': '{hint}'}"],
    ["line 1", "no field 'hint'", "teacher_prompt.text"],
  ),
  "thinking without chat": (
    ["data.sources.texts.prompt.thinking=True"],
    ["prompt.thinking = True", "prompt.chat"],
  ),
  "no such field": (
    ["data.sources.texts.prompt.text={prompt}"],
    ["line 1", "no field 'prompt'", "the row has text", "prompt.text"],
  ),
  "prompt too long": (
    ["data.max_prompt_tokens=17", "data.overlong=error"],
    ["line 4", "18 tokens", "max_prompt_tokens is 17", "truncate_left"],
  ),
  "window too long": (
    ["sampling.max_new_tokens=57"],
    ["8 + 57 = 65", "student's window of 64", "lower"],
  ),
  "top_k": (["sampling.top_k=33"], ["top_k", "[1, V=32]", "33", "None"]),
  "stop id": (
    ["sampling.stop_ids=(32,)"],
    ["stop id 32", "[0, V=32)", "sampling.stop_ids"],
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
  weights = run / "student" / "model.safetensors"
  names = list(load_file(weights))
  index = {name: f"part-{n}.safetensors" for n, name in enumerate(names)}
  (run / "student" / "model.safetensors.index.json").write_text(
    json.dumps({"weight_map": index})
  )
  weights.rename(run / "student" / "part-0.safetensors")
  return ["part-1.safetensors", "index.json names", "download complete?"]


def wrong_shape(run):
  file = run / "teacher" / "model.safetensors"
  tensors = load_file(file)
  name = "model.embed_tokens.weight"
  save_file({**tensors, name: tensors[name][:-1]}, file)
  return [name, "shape (31, 16)", "asks for (32, 16)", "together", "teacher"]


def cut_file(run):
  file = run / "student" / "model.safetensors"
  file.write_bytes(file.read_bytes()[:100])
  return [file.name, "damaged", "download it again"]


def pickles_only(run):
  for file in (run / "student").glob("model*"):
    file.unlink()
  (run / "student" / "pytorch_model.bin").touch()
  return ["pytorch_model.bin", "pickle", "save_pretrained"]


def other_tokenizer(run):
  pair.write_tokenizer(run / "teacher", "bacdefghijklmnopqrstuvwxyz .,")
  return ["differ in 2 of 32 ids", "3: 'a' / 'b', 4: 'b' / 'a'", "choose"]


def smaller_tokenizer(run):
  """The student's stop id 5 has no row in it, which is not what is wrong."""
  shutil.rmtree(run / "teacher")
  (run / "teacher").mkdir()
  pair.write_model(run / "teacher", layers=3, seed=1, vocab_size=4)
  pair.write_tokenizer(run / "teacher", "b")
  return ["differ in 1 of 4 ids", "3: 'a' / 'b'", "choose a teacher"]


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
  (run / "texts.jsonl").write_text("\n")
  return ["texts.jsonl", "no rows", "one object a line"]


def malformed_row(run):
  with (run / "texts.jsonl").open("a") as file:
    file.write('{"text": "abc"\n')
  return ["texts.jsonl, line 11", "not valid JSON", "every line"]


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
    smaller_tokenizer,
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
    (["tarin"], ["'tarin'", ", ".join(cli.COMMANDS)]),
    (["train"], ["--config and --workdir", "opd-jax train --help"]),
    (["train", "--config=a.py"], ["needs --workdir"]),
    (
      ["train", "--config=a.py", "--workdir=gs://bucket/run"],
      ["gs://bucket/run", "install the extra gcs", "use a folder"],
    ),
    (
      ["dataset", "--jsonl=a", "--name=b", "--data_dir=gs://bucket/c"],
      ["gs://bucket/c", "name a folder"],
    ),
    (["train", "--wrokdir=x"], ["'wrokdir'", "workdir"]),
    (["train", "x"], ["'x'", "--flag=value"]),
    (["generate", "--prompt=x"], ["needs --model"]),
    (["dataset", "--name=x"], ["--jsonl and --data_dir"]),
    (
      ["dataset", "--jsonl=nowhere", "--name=x", "--data_dir=y"],
      ["nowhere", "one object a line"],
    ),
    (
      ["dataset", "--jsonl=nowhere", "--name=My-Data", "--data_dir=y"],
      ["'My-Data'", "lower-case"],
    ),
    (
      ["dataset", "--jsonl=x", f"--data_dir={__file__}", "--name=x"],
      [__file__],
    ),
    (["eval", "--data=x"], ["needs --model"]),
    (["generate", "--dtype=float16"], ["float16", "float32|bfloat16"]),
    (["export", "--workdir=nowhere", "--out=new"], ["nowhere", "workdir"]),
    (["export", "--workdir=nowhere", "--out=tests"], ["tests", "another"]),
    (["export", f"--out={__file__}", "--workdir=x"], [__file__, "is a file"]),
    # Nobody can make a folder there, and root is not refused beforehand.
    (
      ["train", "--config=x", "--workdir=/proc/x/y"],
      ["--workdir=/proc/x/y", "cannot write in /proc", "another path"],
    ),
    (
      ["train", "--config=x", "--workdir=/proc/self"],
      ["cannot write in /proc/self", "another path"],
    ),
    (
      ["generate", "--model=x", "--prompt=x", "--json=/proc/x/y.json"],
      ["--json=/proc/x: cannot write in /proc"],
    ),
    (
      ["train", "--config=x", f"--workdir={'x' * 300}"],
      ["cannot write", "too long"],
    ),
  ],
)
def test_a_bad_command_is_refused(arguments, parts, refused):
  line = refused(arguments)
  assert all(part in line for part in parts), line


def test_the_trial_of_a_folder_leaves_nothing(tmp_path):
  kept = tmp_path / "kept"
  kept.mkdir()
  for folder in (kept, tmp_path / "new", kept / "a" / "b"):
    flags.check_folder("--workdir", str(folder))
  assert list(tmp_path.rglob("*")) == [kept]


def test_an_empty_prompt_is_refused(run, refused):
  file = run / "student" / "tokenizer.json"
  values = json.loads(file.read_text())
  file.write_text(json.dumps({**values, "post_processor": None}))
  line = refused(["generate", f"--model={run}/student", "--prompt="])
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
    load_file(folder / "model.safetensors")
    for folder in (out, run / "out" / "export")
  )
  assert got.keys() == want.keys()
  for name, value in want.items():
    np.testing.assert_array_equal(got[name], value)

  line = refused(export_command)
  assert "not an empty folder; name another" in line
  elsewhere = [*export_command[:-1], f"--out={tmp_path}/new"]
  line = refused([*elsewhere, "--step=best"])
  assert "held_out.path" in line
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


def test_a_dataset_of_a_file(run, capfd, tmp_path):
  """What the command prints is a source that a config can name."""
  command = ["dataset", f"--jsonl={run}/texts.jsonl", "--name=letters"]
  assert cli.main([*command, f"--data_dir={tmp_path}/data"]) == 0
  out, err = capfd.readouterr()
  assert not err
  words, _, source = out.strip().partition("; read it with ")
  assert words == f"wrote train to {tmp_path}/data/letters/1.0.0"
  rows = sources.read(SourceConfig(**json.loads(source)))
  assert rows == sources.read(SourceConfig(path=f"{run}/texts.jsonl"))


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


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_is_short_and_free_of_paths(command, capfd):
  assert cli.main([command, "--help"]) == 0
  out, err = capfd.readouterr()
  assert not err
  assert out.startswith(f"usage: opd-jax {command} --")
  assert all(len(line) < 80 for line in out.splitlines())
  assert not any(word in out for word in ("None", ".py:\n", "absl"))
  assert cli.main([]) == 0
  assert f"\n  {command} " in capfd.readouterr().out
