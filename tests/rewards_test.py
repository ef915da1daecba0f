"""The host stage: completions become text, are verified, and are learned from.

The pair's tokenizer has an id per letter; a completion is right if it begins
with the letter that its row names.
"""

import dataclasses
import json
import os
import signal
import types

import jax
import numpy as np
import pytest

from opd_jax import parsing, rewards
from opd_jax import setup as setup_lib
from opd_jax import train as train_lib
from opd_jax.config import RewardConfig, RunConfig
from opd_jax.data.prompts import Batch, Prompts
from opd_jax.errors import InputError
from opd_jax.programs import Programs
from opd_jax.sharding import make_mesh
from opd_jax.step import reward_metrics
from opd_jax.types import PromptBatch, Rollout
from tests import pair

VERIFIER = "tests.rewards_test:begins"
GRPO = {"name": "grpo"}


def begins(completion, answer):
  """Half a point for an even number of letters, too."""
  text = completion.replace(" ", "")
  return 0.5 * text.startswith(answer) + 0.5 * (len(text) % 2 == 0)


def fails(completion, answer):
  raise KeyError(answer)


def begins_on_the_first(completion, answer):
  """Another verifier by process, as a judge or a time limit may be."""
  score = begins(completion, answer)
  return score if jax.process_index() == 0 else 1 - score


def fails_on_the_first(completion, answer):
  if jax.process_index() == 0:
    raise KeyError(answer)
  return 0.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = pair.write_pair(tmp_path_factory.mktemp("pair"))
  rows = [{"text": letter, "right": letter} for letter in "abcdefghij"]
  lines = [json.dumps(row) for row in rows]
  (folder / "texts.jsonl").write_text("\n".join(lines) + "\n")
  return folder


@pytest.fixture
def one_device(monkeypatch):
  monkeypatch.setattr(
    setup_lib, "make_mesh", lambda sizes: make_mesh({}, jax.devices()[:1])
  )


def config_of(folder, **changes):
  values = pair.config_of(
    folder,
    **{
      "held_out": {},
      "objective": GRPO,
      "reward": {"verifier": VERIFIER},
      "steps": 4,
      **changes,
    },
  )
  values["data"]["sources"]["texts"].setdefault("answer", "{right}")
  return parsing.parse(RunConfig, values)


def records(workdir, file="metrics.jsonl"):
  lines = (workdir / file).read_text().splitlines()
  return [json.loads(line) for line in lines]


# --- What is refused. ---


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"mode": "fused"}, 'needs the host .* set mode to None or "split"'),
    ({"reward": None}, r"grpo needs rewards.*reward\.verifier to \"number\""),
    (
      {"objective": {"name": "gkd"}},
      "gkd with these options reads no rewards; set reward to None",
    ),
    (
      {"batch": {"prompts": 4, "rollouts": 1}},
      r"batch\.rollouts = 1, but objective grpo compares .* at least 2",
    ),
    ({"objective": {**GRPO, "kl": 0.1}}, "needs a reference model"),
    ({"reward": {"verifier": "nummer"}}, "unknown verifier 'nummer'; known"),
    (
      {"reward": {"verifier": "number"}},
      "line 1: verifier \"number\": the answer 'a' has no number",
    ),
    (
      {"reward": {"verifier": "tests.rewards_test:fails"}},
      "line 1: verifier 'tests.rewards_test:fails' raised KeyError",
    ),
  ],
)
def test_refused_before_anything_runs(folder, changes, named):
  with pytest.raises(InputError, match=named):
    setup_lib.prepare(config_of(folder, **changes))


def test_a_row_without_its_answer(folder):
  texts = {"path": str(folder / "texts.jsonl"), "answer": "{solution}"}
  data = {"sources": {"texts": texts}, "max_prompt_tokens": 8}
  with pytest.raises(InputError, match="line 1: no field 'solution', which"):
    setup_lib.prepare(config_of(folder, data=data))
  # Nobody asks for answers where nothing is verified.
  config = config_of(folder, data=data, objective={"name": "gkd"}, reward=None)
  assert setup_lib.prepare(config).mode == "fused"


# --- The stage by itself. ---


def test_rewards_are_of_the_text_and_of_the_rows_answer(folder):
  """Rollouts b * G + g are of prompt b; behind the end nothing is read."""
  config = config_of(folder)
  setup = setup_lib.prepare(config)
  vocabulary = {
    token: index for index, token in setup.tokenizer.vocabulary.items()
  }
  stop = vocabulary["</s>"]
  # Rows 2 and 0 have the answers "c" and "a".
  batch = Batch(
    tokens=np.zeros((2, 1), np.int32),
    lengths=np.ones(2, np.int32),
    rows=(2, 0),
    answers=("c", "a"),
  )
  texts = ["c", "ca", "a", "c"]
  tokens = np.full((4, 4), vocabulary["z"], np.int32)
  mask = np.zeros((4, 4), bool)
  for row, text in enumerate(texts):
    ids = [*(vocabulary[letter] for letter in text), stop]
    tokens[row, : len(ids)] = ids
    mask[row, : len(ids)] = True
  rollout = Rollout(
    prompts=PromptBatch(
      tokens=np.ones((4, 1), np.int32), lengths=np.ones(4, np.int32)
    ),
    tokens=tokens,
    lengths=mask.sum(axis=1),
    sampled_mask=mask,
    behavior_logprobs=np.zeros((4, 4), np.float32),
    stop_reason=np.ones(4, np.int32),
  )
  assert [
    rewards.completion(setup.tokenizer, rollout, row).replace(" ", "")
    for row in range(4)
  ] == texts
  found = setup.rewards(batch, rollout)
  assert found.dtype == np.float32
  assert found.tolist() == [0.5, 1.0, 0.5, 0.0]


def test_a_verifier_that_fails_names_the_row(folder):
  setup = setup_lib.prepare(config_of(folder))
  assert setup.prompts.where(3).endswith("texts.jsonl, line 4")
  assert dict(setup.prompts.answers())[3] == "d"
  prompts = types.SimpleNamespace(answers=lambda: [(3, "d")], where=str)
  with pytest.raises(InputError, match=r"^3: verifier .* raised KeyError"):
    rewards.prepare(
      RewardConfig(verifier="tests.rewards_test:fails"),
      setup.tokenizer,
      prompts,
    )


def test_other_answers_are_other_prompts(folder):
  """A run is not resumed with answers that have changed."""
  config = config_of(folder)
  tokenizer = setup_lib.prepare(config).tokenizer

  def state(answer, with_answers=True):
    source = dataclasses.replace(config.data.sources["texts"], answer=answer)
    data = dataclasses.replace(config.data, sources={"texts": source})
    return Prompts(
      data,
      tokenizer,
      seed=0,
      batch_size=2,
      vocab_size=32,
      with_answers=with_answers,
    ).get_state()["prompts"]

  assert state("{right}") != state("{right}!")
  # Without a verifier they are no part of the run.
  assert state("{right}", False) == state("{right}!", False)


def test_figures_by_hand():
  """Groups 1 0, 1 1, 0 0, 0.5 1: mean 4.5 / 8, two of four agree."""
  values = np.array([1, 0, 1, 1, 0, 0, 0.5, 1], np.float32)
  found = reward_metrics(values, 2)
  np.testing.assert_allclose(found["reward/mean"], 4.5 / 8, rtol=1e-6)
  np.testing.assert_allclose(found["reward/std"], values.std(), rtol=1e-6)
  assert found["reward/equal_groups"] == 0.5


# --- Runs. ---


def test_a_run_verifies_stops_and_goes_on(
  folder, one_device, monkeypatch, tmp_path
):
  """Its rewards are those of its texts; 2 and 2 steps are 4, to the byte."""
  whole = train_lib.train(config_of(folder), tmp_path / "whole")
  assert whole.finished
  run, calls = Programs.__call__, []

  def terminated(self, *arguments):
    calls.append(None)
    if len(calls) == 2:
      os.kill(os.getpid(), signal.SIGTERM)
    return run(self, *arguments)

  with monkeypatch.context() as patch:
    patch.setattr(Programs, "__call__", terminated)
    stopped = train_lib.train(config_of(folder), tmp_path / "resumed")
  assert stopped.step == 2
  train_lib.train(config_of(folder), tmp_path / "resumed")
  name = "export/model.safetensors"
  assert (tmp_path / "whole" / name).read_bytes() == (
    tmp_path / "resumed" / name
  ).read_bytes()

  found = [r for r in records(tmp_path / "whole") if "train/loss" in r]
  assert all(0 < record["reward/mean"] < 1 for record in found)
  assert all(0 <= record["reward/equal_groups"] < 1 for record in found)
  # Advantages of a group add up to 0, and so does the loss; not its gradient.
  assert all(record["optimizer/grad_norm"] > 1e-3 for record in found)
  # No teacher was scored.
  assert not any(name.startswith("teacher/") for name in found[0])
  samples = records(tmp_path / "whole", "samples.jsonl")
  assert len(samples) == 8
  for sample in samples:
    answer = sample["prompt"].strip()
    assert sample["reward"] == begins(sample["completion"], answer)


def test_a_verifier_that_fails_in_a_run_loses_no_step(
  folder, one_device, monkeypatch, tmp_path
):
  """Two steps are saved, and the third is taken again with the same prompts."""
  train_lib.train(config_of(folder), tmp_path / "whole")
  verify, calls = rewards.Rewards.__call__, []

  def fussy(self, *arguments):
    calls.append(None)
    if len(calls) == 3:
      raise InputError("cannot bear it")
    return verify(self, *arguments)

  with monkeypatch.context() as patch:
    patch.setattr(rewards.Rewards, "__call__", fussy)
    with pytest.raises(InputError, match="cannot bear it"):
      train_lib.train(config_of(folder), tmp_path / "cut")
  assert train_lib.train(config_of(folder), tmp_path / "cut").finished
  assert len(calls) == 3
  name = "export/model.safetensors"
  assert (tmp_path / "whole" / name).read_bytes() == (
    tmp_path / "cut" / name
  ).read_bytes()


def test_eight_devices_are_one(folder, monkeypatch, tmp_path):
  """The same completions, rewards and losses on a mesh."""
  for name, sizes, devices in (
    ("one", {}, 1),
    ("eight", {"replica": 2, "fsdp": 2, "tensor": 2}, 8),
  ):
    mesh = make_mesh(sizes, jax.devices()[:devices])
    monkeypatch.setattr(setup_lib, "make_mesh", lambda _, mesh=mesh: mesh)
    # The parts of a step are timed by themselves, too, without rewards.
    log = {"every": 1, "time_split_every": 1}
    train_lib.train(config_of(folder, steps=2, log=log), tmp_path / name)
  one, eight = (
    [r for r in records(tmp_path / name) if "train/loss" in r]
    for name in ("one", "eight")
  )
  for left, right in zip(one, eight, strict=True):
    for key in ("reward/mean", "reward/std", "rollout/tokens"):
      assert left[key] == right[key]
    assert left["time/sample"] > 0
    key = "optimizer/grad_norm"
    np.testing.assert_allclose(left[key], right[key], rtol=1e-4)
