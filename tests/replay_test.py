"""The replay of DistiLLM: buffer, source of a step, threshold, whole runs."""

import collections
import dataclasses
import functools
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import cli, interrupts
from opd_jax import setup as setup_lib
from opd_jax.config import RolloutConfig, RunConfig
from opd_jax.parsing import parse
from opd_jax.replay import Buffer, Threshold
from opd_jax.saved import find
from opd_jax.sharding import make_mesh
from opd_jax.train import train
from opd_jax.types import PromptBatch, Rollout
from tests import engine, pair

BUFFER = Buffer(capacity=5, window=2, length=3)


def rollout_of(numbers):
  rows = len(numbers)
  column = jnp.asarray(numbers, jnp.int32)[:, None]
  return Rollout(
    prompts=PromptBatch(
      tokens=jnp.tile(column, (1, 2)), lengths=jnp.full(rows, 2, jnp.int32)
    ),
    tokens=jnp.tile(column, (1, 3)),
    lengths=column[:, 0] % 4,
    sampled_mask=jnp.ones((rows, 3), bool),
    behavior_logprobs=jnp.full((rows, 3), -1.0),
    stop_reason=column[:, 0] % 2,
  )


def test_the_buffer_is_first_in_first_out():
  state, expected = BUFFER.empty(), collections.deque(maxlen=5)
  for number in range(6):
    numbers = list(range(3 * number, 3 * number + 3))
    fresh = number != 2
    state = BUFFER.push(state, rollout_of(numbers), jnp.asarray(fresh))
    if fresh:
      expected.extend(numbers)
    filled = int(state["filled"])
    assert filled == len(expected)
    kept = np.sort(np.asarray(state["tokens"])[:filled, 0])
    assert kept.tolist() == sorted(expected)


def test_a_replayed_batch_is_of_different_completions_as_they_were():
  state = BUFFER.empty()
  for numbers in ([20, 21, 22], [23, 24, 25]):
    state = BUFFER.push(state, rollout_of(numbers), jnp.asarray(True))
  seen = set()
  for seed in range(20):
    found = BUFFER.pull(state, 3, jax.random.key(seed))
    numbers = np.asarray(found.tokens)[:, 0].tolist()
    assert len(set(numbers)) == 3
    seen |= set(numbers)
    expected = rollout_of(numbers)
    for name in ("tokens", "lengths", "stop_reason"):
      np.testing.assert_array_equal(
        getattr(found, name), getattr(expected, name)
      )
    np.testing.assert_array_equal(found.prompts.tokens, expected.prompts.tokens)
    assert not found.sampled_mask.any()
  assert seen == {21, 22, 23, 24, 25}


@pytest.mark.parametrize("filled", [4, 5])
def test_what_a_step_trains_on(filled):
  """As the official code has it, from the same uniform."""
  state = {**BUFFER.empty(), "filled": jnp.int32(filled)}
  threshold, progress, seen = 0.6, 0.5, set()
  for seed in range(60):
    key = jax.random.key(seed)
    found = BUFFER.source(
      state, jnp.float32(threshold), jnp.float32(progress), key
    )
    uniform = float(jax.random.uniform(key))
    if uniform < threshold * (1 - progress) or (
      uniform < threshold and filled < BUFFER.capacity
    ):
      expected = "fresh"
    else:
      expected = "replayed" if uniform < threshold else "stored"
    assert bool(found.fresh) == (expected == "fresh")
    assert bool(found.replayed) == (expected == "replayed")
    seen.add(expected)
  assert seen == {"fresh", "stored"} | ({"replayed"} if filled == 5 else set())


def test_the_threshold_follows_the_loss():
  threshold = Threshold(RolloutConfig(replay_capacity=5))
  values = []
  for loss in (2.0, 2.05, 2.11, 2.15, 1.0, 2.22, 2.35):
    threshold.observe(loss)
    values.append(threshold.value)
    # A resumed run goes on with the same.
    state = json.loads(json.dumps(threshold.get_state()))
    threshold = Threshold(RolloutConfig(replay_capacity=5))
    threshold.set_state(state)
  # The reference is 2.0, 2.11, 2.22, 2.35; the low 1.0 does not move it.
  np.testing.assert_allclose(values, [0, 0, 0.1, 0.1, 0.1, 0.2, 0.3])
  for loss in range(3, 13):
    threshold.observe(float(loss))
  assert threshold.value == 1.0


# Of ten, whose uniforms with this seed are 0.285, 0.640 and 0.922.
STEPS = (0, 3, 8)


@functools.cache
def steps_of(devices, mode="fused"):
  """Where the completions of steps come from, tokens, and the last state."""
  mesh = {"replica": 2, "fsdp": 2, "tensor": 2} if devices == 8 else {}
  step = engine.make_step(
    "distillm",
    mesh=mesh,
    devices=devices,
    mixing=RolloutConfig(replay_capacity=8),
    replay=Buffer(capacity=8, window=engine.WINDOW, length=engine.LENGTH),
  )
  state, frozen = engine.make_state(step)
  one = jnp.full((engine.PROMPTS, engine.LENGTH), 40, jnp.int32)
  inputs = dataclasses.replace(
    engine.make_inputs(),
    given=PromptBatch(tokens=one, lengths=jnp.full(engine.PROMPTS, 2)),
    replay_threshold=jnp.float32(0.9),
  )
  programs = [step.train, step.rollout, step.update_from]
  run, draw, update = map(jax.jit, programs)
  shown = []
  for number in STEPS:
    state = dataclasses.replace(state, step=jnp.int32(number))
    if mode == "fused":
      state, metrics, rollout = run(state, frozen, inputs)
    else:
      rollout = draw(state.params, frozen, state.step, inputs, state.replay)
      state, metrics = update(state, frozen, inputs, rollout)
    shown.append(
      (
        float(metrics["rollout/given_rows"]),
        float(metrics["replay/filled"]),
        np.asarray(rollout.tokens),
        np.asarray(rollout.prompts.tokens),
      )
    )
  return shown, jax.device_get((state.params, state.replay))


def test_a_step_draws_replays_or_takes_what_is_stored():
  shown, _ = steps_of(1)
  given, filled, tokens, prompts = zip(*shown, strict=True)
  assert given == (0.0, 1.0, 1.0)
  assert filled == (8.0, 8.0, 8.0)

  def rows(index):
    both = np.concatenate([prompts[index], tokens[index]], axis=1)
    return sorted(map(tuple, both.tolist()))

  # All that the full buffer holds, in an order of its own.
  assert rows(1) == rows(0)
  assert not np.array_equal(tokens[1], tokens[0])
  assert (tokens[2] == [40, 40, 0, 0, 0, 0, 0]).all()


@pytest.mark.parametrize(("devices", "mode"), [(1, "split"), (8, "fused")])
def test_two_programs_and_eight_devices_are_one(devices, mode):
  shown, (params, replay) = steps_of(1)
  other, (other_params, other_replay) = steps_of(devices, mode)
  jax.tree.map(np.testing.assert_array_equal, other, shown)
  jax.tree.map(np.testing.assert_array_equal, other_replay, replay)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4),
    other_params,
    params,
  )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = pair.write_pair(tmp_path_factory.mktemp("pair"))
  assert (
    cli.main(
      [
        "generate",
        f"--model={folder}/teacher",
        f"--data={folder}/texts.jsonl",
        "--prompt={text}",
        "--max_new_tokens=6",
        f"--out={folder}/store.parquet",
      ]
    )
    == 0
  )
  return folder


def test_a_resumed_run_is_an_uninterrupted_one(folder, tmp_path, monkeypatch):
  """Buffer, threshold and weights, bit by bit; the threshold has moved."""
  values = pair.config_of(
    folder,
    objective={"name": "distillm"},
    optimizer={"learning_rate": 3e-2},  # So that the held-out loss rises.
    data={
      "sources": {
        "stored": {"path": str(folder / "store.parquet"), "given": True}
      },
      "max_prompt_tokens": 32,
    },
    rollout={
      "replay_capacity": 8,
      "replay_threshold": 0.5,
      "replay_rise": 0.01,
    },
    checkpoint={"every": 100},
    preflight={"allow": ("eval_rows_in_training",)},
  )
  values["data"]["sources"]["stored"]["prompt"] = {"text": "{text}"}
  config = parse(RunConfig, values)
  monkeypatch.setattr(
    setup_lib, "make_mesh", lambda sizes: make_mesh({}, jax.devices()[:1])
  )
  train(config, tmp_path / "whole")

  def stop(interrupts, step):
    interrupts.signal = signal.SIGTERM if step == 3 else None
    return interrupts.signal is not None

  with monkeypatch.context() as patch:
    patch.setattr(interrupts.Interrupts, "stop", stop)
    assert train(config, tmp_path / "cut").step == 3
  assert train(config, tmp_path / "cut").finished

  def arrays(workdir):
    import orbax.checkpoint as ocp

    path = workdir / "checkpoints" / "6" / "state"
    with ocp.StandardCheckpointer() as reader:
      return reader.restore(path.resolve())

  whole, cut = arrays(tmp_path / "whole"), arrays(tmp_path / "cut")
  jax.tree.map(np.testing.assert_array_equal, whole, cut)
  assert whole["replay"]["filled"] > 0
  # Other commands read such a checkpoint too.
  _, state = find(tmp_path / "whole").restore()
  np.testing.assert_array_equal(
    state.replay["tokens"], whole["replay"]["tokens"]
  )
  records = [
    json.loads(line)
    for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
  ]
  thresholds = [r["replay/threshold"] for r in records if "train/loss" in r]
  assert thresholds[0] == 0.5
  assert thresholds[-1] > 0.5
