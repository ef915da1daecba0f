"""Runs on stored completions: the page's commands, batches, refusals."""

import dataclasses
import json
import pathlib
import re
import shlex
import shutil

import jax
import numpy as np
import pytest

from opd_jax import cli, preflight, tokenizer
from opd_jax import setup as setup_lib
from opd_jax.config import RunConfig
from opd_jax.data import files, store
from opd_jax.errors import InputError
from opd_jax.models import hf
from opd_jax.parsing import parse
from opd_jax.saved import find
from opd_jax.sharding import make_mesh
from opd_jax.train import describe, place_inputs
from tests import pair

REPO = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A pair with `store.parquet`, two completions of each of ten texts."""
  folder = pair.write_pair(tmp_path_factory.mktemp("pair"))
  generate(folder, "--samples=2", f"--out={folder}/store.parquet")
  return folder


def generate(folder, *flags, model="teacher"):
  arguments = [
    "generate",
    f"--model={folder}/{model}",
    f"--data={folder}/texts.jsonl",
    "--prompt={text}",
    "--max_new_tokens=8",
    *flags,
  ]
  assert cli.main(arguments) == 0


@pytest.mark.parametrize(
  ("field", "out"),
  [
    ("completion", "clash.parquet"),
    ("logprobs", "clash.parquet"),
    ("prompt_ids", "clash.parquet"),
    ("logprob", "clash.jsonl"),
  ],
)
def test_a_field_that_would_be_overwritten_is_named(
  folder, tmp_path, capfd, field, out
):
  path = tmp_path / "rows.jsonl"
  path.write_text(json.dumps({"text": "a b", field: "mine"}) + "\n")
  arguments = [
    "generate",
    f"--model={folder}/teacher",
    f"--data={path}",
    "--prompt={text}",
    f"--out={tmp_path / out}",
  ]
  assert cli.main(arguments) == 2
  err = capfd.readouterr().err
  assert f"line 1: field {field!r} would be overwritten" in err
  assert not (tmp_path / out).exists()


def config_of(folder, path="store.parquet", source=None, **changes):
  values = pair.config_of(
    folder,
    **{"rollout": {"stored_fraction": 0.5}, "held_out": {}, **changes},
  )
  values["data"] = {
    "sources": {
      "stored": {"path": str(folder / path), "given": True, **(source or {})}
    },
    "max_prompt_tokens": 32,
  }
  return parse(RunConfig, values)


def refusal(config):
  with pytest.raises(InputError) as caught:
    setup_lib.prepare(config)
  return str(caught.value)


def test_a_store_names_who_wrote_it(folder):
  origin = store.read_origin(folder / "store.parquet")
  assert origin.model == str(folder / "teacher")
  assert origin.weights == hf.fingerprint(folder / "teacher")
  assert origin.weights != hf.fingerprint(folder / "student")
  assert origin.samples == 2
  assert origin.sampling["max_new_tokens"] == 8
  assert origin.sampling["stop_ids"] == [2, 5]
  tokens = tokenizer.load(folder / "teacher")
  assert origin.tokenizer == tokens.fingerprint()
  rows = files.read_parquet(folder / "store.parquet")
  assert len(rows) == 20
  for row in rows:
    assert row["prompt_ids"] == tokens.encode(row["text"])
    assert row["stopped"] == (row["completion_ids"][-1] in (2, 5))
    assert len(row["logprobs"]) == len(row["completion_ids"])
    assert row["completion"] == tokens.decode_after(
      row["prompt_ids"], row["completion_ids"]
    )


def test_batches_hold_the_stored_ids(folder):
  """Cut at this run's limit of 6, and counted."""
  setup = setup_lib.prepare(config_of(folder))
  rows = files.read_parquet(folder / "store.parquet")
  batch = next(setup.prompts)
  for slot, row in enumerate(batch.rows):
    ids = rows[row]["completion_ids"][:6]
    assert batch.given.lengths[slot] == len(ids)
    assert batch.given.tokens[slot, : len(ids)].tolist() == ids
  longer = sum(len(row["completion_ids"]) > 6 for row in rows)
  assert longer
  assert setup.prompts.report.given_cut == longer
  with jax.default_device(jax.devices()[0]):
    step = setup_lib.make_step(setup, make_mesh({}, jax.devices()[:1]))
  inputs = place_inputs(batch, step.scorer.student.layout)
  np.testing.assert_array_equal(inputs.given.tokens, batch.given.tokens)


def test_changed_completions_are_another_run(folder):
  """A resumed iterator refuses them."""
  before = setup_lib.prepare(config_of(folder)).prompts.get_state()
  generate(folder, "--samples=2", "--seed=1", f"--out={folder}/other.parquet")
  after = setup_lib.prepare(config_of(folder, "other.parquet")).prompts
  with pytest.raises(InputError, match="the prompts changed"):
    after.set_state(before)


def test_weights_of_another_model_are_a_finding(folder):
  generate(folder, f"--out={folder}/student.parquet", model="student")

  def findings(path):
    setup = setup_lib.prepare(config_of(folder, path))
    step = setup_lib.make_step(setup, make_mesh({}, jax.devices()[:1]))
    report = preflight.inspect(setup, step)
    return {
      finding.name: finding.message
      for section in report.sections
      for finding in section.findings
    }

  name = "store_of_another_model"
  assert name not in findings("store.parquet")
  message = findings("student.parquet")[name]
  assert f"{folder}/student" in message
  assert "generate it again with --model=" in message
  assert preflight.KINDS[name][0] == "error"


def test_a_completion_is_not_given_behind_a_part_of_its_prompt(folder):
  config = config_of(folder)

  def cut(overlong):
    data = dataclasses.replace(
      config.data, max_prompt_tokens=16, overlong=overlong
    )
    return dataclasses.replace(config, data=data)

  message = refusal(cut("truncate_left"))
  parts = ["row 5: the prompt has 17 tokens", 'data.overlong to "drop"']
  assert all(part in message for part in parts), message
  setup = setup_lib.prepare(cut("drop"))
  rows = files.read_parquet(folder / "store.parquet")
  short = [row for row in rows if len(row["prompt_ids"]) <= 16]
  assert setup.prompts.report.kept == len(short) > 0


def test_another_tokenizer_is_refused(folder, tmp_path):
  shutil.copytree(folder, tmp_path / "pair")
  other = tmp_path / "pair"
  for role in ("student", "teacher"):
    pair.write_tokenizer(other / role, "zyxwvutsrqponmlkjihgfedcba .,")
  message = refusal(config_of(other))
  assert "ids of another tokenizer" in message
  assert "generate the store again" in message


@pytest.mark.parametrize(
  ("changes", "parts"),
  [
    ({"path": "texts.jsonl"}, ["texts.jsonl is no file of stored", "--out="]),
    (
      {"source": {"prompt": {"text": "{text} "}}},
      ["store.parquet, row 1: the completion was written behind", "template"],
    ),
    (
      {"sampling": {"max_new_tokens": 6, "stop_ids": (2, 5, *range(6, 30))}},
      ["goes on behind id", "sampling.stop_ids"],
    ),
    (
      {"sampling": {"max_new_tokens": 6, "stop_ids": (2,)}},
      ["with stop ids [2, 5], and [5] do not end", "stop_ids to [2, 5]"],
    ),
    (
      {"objective": {"name": "opd_k1"}},
      ["opd_k1 is right only for tokens that the student draws", "gkd"],
    ),
    ({"rollout": {}}, ["nothing uses its completions", "stored_fraction"]),
    ({"source": {"given": False}}, ["no source has any", "--out=FILE.parquet"]),
    (
      {
        "source": {"given": False},
        "rollout": {},
        "objective": {"name": "tropd", "top_k": 5, "guidance": 0.1},
      },
      ["objective.guidance", 'rollout.prefix to "cosine"'],
    ),
    (
      {"rollout": {"replay_capacity": 7}, "objective": {"name": "distillm"}},
      ["replay_capacity = 7 is less than the 8 completions"],
    ),
    (
      {"rollout": {"replay_capacity": 8}, "objective": {"name": "distillm"}},
      ["held_out.path is None"],
    ),
    (
      {"rollout": {"replay_capacity": 8}, "objective": {"name": "tropd"}},
      ["replay_capacity = 8", "tropd would take for the teacher's", "gkd"],
    ),
  ],
)
def test_a_mistake_is_named(folder, changes, parts):
  message = refusal(config_of(folder, **changes))
  assert all(part in message for part in parts), message


@pytest.mark.parametrize(
  ("rollout", "part"),
  [
    ({"stored_fraction": 1.5}, "stored_fraction must be in [0, 1], got 1.5"),
    ({"prefix": "linear"}, "rollout.prefix must be one of"),
    ({"replay_capacity": 0}, "replay_capacity must be >= 1, got 0"),
    ({"replay_rise": 0.0}, "replay_rise must be > 0"),
    ({"replay_threshold": 0.5}, "replay_threshold = 0.5 has no effect here"),
    ({"replay_raise": 0.5}, "leave it out, or set rollout.replay_capacity"),
    ({"replay_rise": 0.5}, "replay_rise = 0.5 has no effect"),
    ({"stored_scope": "step"}, "stored_scope = 'step' has no effect"),
    ({"prefix_draw": "uniform"}, 'or set rollout.prefix to "cosine"'),
    (
      {"stored_fraction": 1.0, "prefix": "cosine"},
      "prefix = 'cosine' has no effect",
    ),
    (
      {"replay_capacity": 9, "stored_fraction": 0.5},
      "leave out rollout.stored_fraction = 0.5",
    ),
  ],
)
def test_a_value_out_of_range_is_named(folder, rollout, part):
  with pytest.raises(InputError) as caught:
    config_of(folder, rollout=rollout)
  assert part in str(caught.value)


@pytest.mark.slow
def test_commands_of_the_page(folder, tmp_path, monkeypatch, capfd):
  """As they are printed, with two steps; `sft` learns the same file."""
  for name in ("configs", "checkpoints"):
    shutil.copytree(REPO / name, tmp_path / name)
  monkeypatch.chdir(tmp_path)
  text = (REPO / "docs" / "stores.md").read_text().replace("\\\n", " ")
  commands = [
    shlex.split(line)
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.S | re.M)
    for line in block.splitlines()
  ]
  assert [command[1] for command in commands] == ["generate", "train", "train"]
  commands.append(
    shlex.split(
      "opd-jax sft --config=configs/arith_sft.py:runs/teacher.parquet "
      "--workdir=runs/sft"
    )
  )
  short = ["--config.steps=2", "--config.eval.source=None"]
  for _, *arguments in commands:
    extra = ["--rows=130"] if arguments[0] == "generate" else short
    assert cli.main([*arguments, *extra]) == 0, capfd.readouterr().err
  for run in ("stored", "prefixes"):
    records = [
      json.loads(line)
      for line in pathlib.Path(f"runs/{run}/metrics.jsonl")
      .read_text()
      .splitlines()
    ]
    given = [r["rollout/given_tokens"] for r in records if "train/loss" in r]
    assert given
    assert all(0 < share <= 1 for share in given)
  # A run's checkpoint has no files that could be named.
  with pytest.raises(InputError, match="export it with opd-jax export"):
    find("runs/stored").fingerprint()


@pytest.mark.parametrize(
  ("objective", "rollout", "told"),
  [
    (
      {"name": "gkd"},
      {"stored_fraction": 0.5},
      "stored completions: 25 % of the rows",
    ),
    (
      {"name": "tropd", "top_k": 4},
      {"prefix": "cosine"},
      "prefixes: 50 % of the rows begin with stored tokens, at most 6 of them",
    ),
    (
      {"name": "distillm"},
      {"replay_capacity": 8},
      "replay: 0 % of the steps draw or replay at first, of 8 completions; "
      "the others take stored ones, which 50 % of the rows have; nothing is "
      "drawn for these until the held-out loss has risen",
    ),
  ],
)
def test_a_run_says_what_it_expects_to_be_given(
  folder, objective, rollout, told
):
  """A store in one of two sources is half of the rows."""
  values = pair.config_of(
    folder,
    objective=objective,
    rollout=rollout,
    preflight={"allow": ("eval_rows_in_training",)},
  )
  values["data"]["sources"]["stored"] = {
    "path": str(folder / "store.parquet"),
    "prompt": {"text": "{text}"},
    "given": True,
  }
  values["data"]["max_prompt_tokens"] = 32
  setup = setup_lib.prepare(parse(RunConfig, values))
  step = setup_lib.make_step(setup, make_mesh({}, jax.devices()[:1]))
  assert told in "\n".join(describe(setup, step))
