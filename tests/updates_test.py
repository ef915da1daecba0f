"""Several updates per rollout batch: equal to as many steps made by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opd_jax import optim
from opd_jax.config import OptimizerConfig
from opd_jax.update import Turn
from tests import engine

CONFIG = OptimizerConfig(
  learning_rate=1e-2, warmup_steps=2, schedule="cosine", weight_decay=0.1
)


def make_step(name, mini_batches=1, epochs=1, **changes):
  updates = mini_batches * epochs
  made = {
    "optimizer": optim.build(CONFIG, steps=10, updates=updates),
    "learning_rate": optim.learning_rate(CONFIG, steps=10),
  }
  return engine.make_step(
    name, mini_batches=mini_batches, epochs=epochs, **{**made, **changes}
  )


@functools.cache
def case():
  """A state two steps into its run, frozen weights, inputs and a rollout."""
  step = make_step("exopd")
  state, frozen = engine.make_state(step)
  inputs = engine.make_inputs()
  rollout = jax.jit(step.rollout)(state.params, frozen, state.step, inputs)
  return state, frozen, inputs, rollout


def state_of(step):
  """The state at step 2 of 10, by the count of the optimizer too."""
  state, *_ = case()
  updates = 2 * step.mini_batches * step.epochs
  optimizer = optax.tree.set(state.optimizer, count=jnp.int32(updates))
  return dataclasses.replace(
    state,
    step=jnp.int32(2),
    optimizer=optimizer,
    objective=step.objective.init_state(),
  )


def rows_of(tree, rows):
  return jax.tree.map(lambda leaf: leaf[np.array(rows)], tree)


def assert_close(left, right, atol=1e-6):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol),
    left,
    right,
  )


def by_hand(step, start=None):
  """The updates of a step one after the other, on rows picked by hand.

  Of 4 prompts with 2 rollouts each, two mini-batches have the prompts 0, 2 and
  1, 3. Yields the state before each update, its batch and its turn.
  """
  _, frozen, inputs, rollout = case()
  whole = step.scoring_batch(rollout, inputs)
  whole = dataclasses.replace(whole, start_logprobs=start)
  halves = [(0, 1, 4, 5), (2, 3, 6, 7)] if step.mini_batches == 2 else None
  state = state_of(step)
  count = step.mini_batches * step.epochs
  # A plain step makes the updates: nothing of a loop is in it.
  plain = dataclasses.replace(step, mini_batches=1, epochs=1)
  update = jax.jit(
    lambda state, batch, turn: plain.update(
      state, frozen, batch, pure_sampling=True, turn=turn
    )
  )
  metrics = []
  for number in range(count):
    half = number % step.mini_batches
    batch = whole if halves is None else rows_of(whole, halves[half])
    if halves is not None:
      groups = jnp.array([0, 0, 1, 1], jnp.int32)
      batch = dataclasses.replace(batch, group=groups)
    turn = Turn(jnp.int32(half), jnp.float32(number / count))
    state, found = update(state, batch, turn)
    assert int(state.step) == 3
    state = dataclasses.replace(state, step=jnp.int32(2))
    metrics.append(found)
  return dataclasses.replace(state, step=jnp.int32(3)), metrics


def run(step):
  _, frozen, inputs, rollout = case()
  return jax.jit(step.update_from)(state_of(step), frozen, inputs, rollout)


def start_of(step):
  """The student's log-probabilities at the start, as the sampler saw them."""
  *_, inputs, rollout = case()
  batch = step.scoring_batch(rollout, inputs)
  start = jax.jit(step.start_logprobs)(state_of(step).params, batch)
  np.testing.assert_allclose(start, rollout.behavior_logprobs, atol=1e-5)
  return start


@pytest.mark.parametrize(
  ("name", "mini_batches", "epochs"),
  [
    ("tropd", 2, 2),
    ("minillm", 2, 2),
    ("reopold_refining", 1, 3),
    ("stateful", 2, 1),
  ],
)
def test_updates_of_a_step_are_updates_one_after_the_other(
  name, mini_batches, epochs
):
  step = make_step(name, mini_batches, epochs)
  needs = (step.objective.needs, step.objective.prepare_needs)
  start = start_of(step) if any(need.start for need in needs) else None
  expected, by_update = by_hand(step, start)
  found, metrics = run(step)
  assert_close(found, expected)
  firsts = {"mismatch/mean", "mismatch/max", "teacher/kl"}
  for name, value in by_update[0].items():
    values = [float(update[name]) for update in by_update]
    if name in firsts:
      value = values[0]
    elif name.endswith("max"):
      value = max(values)
    else:
      value = np.mean(values)
    np.testing.assert_allclose(metrics[name], value, atol=1e-5, err_msg=name)
  assert float(metrics["mismatch/max"]) <= 1e-5
  assert by_update[0]["train/loss"] != by_update[-1]["train/loss"]


def test_two_halves_are_two_steps_of_one_update():
  """The weights, moments and loss of today's step on each half of the rows."""
  step = make_step("gkd", mini_batches=2)
  _, frozen, inputs, rollout = case()
  state = state_of(step)
  plain = make_step("gkd", rollouts=1, optimizer=step.optimizer)
  update = jax.jit(plain.update_from)
  losses = []
  for rows in ((0, 1, 4, 5), (2, 3, 6, 7)):
    half = dataclasses.replace(inputs, privileged=None)
    state, metrics = update(state, frozen, half, rows_of(rollout, rows))
    losses.append(metrics["train/loss"])
  found, metrics = run(step)
  assert_close(found.params, state.params)
  assert_close(found.optimizer, state.optimizer)
  assert int(found.step) == 3
  np.testing.assert_allclose(metrics["train/loss"], np.mean(losses), rtol=1e-5)


def test_the_ratio_at_the_second_update_says_how_far_the_student_moved():
  """exp(s_now - b) of whole forwards, its mean, its maximum and its KL."""
  step = make_step("opd_k1", epochs=2)
  _, frozen, inputs, rollout = case()
  batch = step.scoring_batch(rollout, inputs)
  once = make_step("opd_k1", optimizer=step.optimizer)
  moved, _ = jax.jit(once.update_from)(state_of(step), frozen, inputs, rollout)
  now = jax.jit(once.gradient)(moved, frozen, batch).observed["student"]
  log_ratio = np.asarray(now["logprobs"] - rollout.behavior_logprobs)
  log_ratio = log_ratio[np.asarray(batch.loss_mask)]
  ratios = np.exp(log_ratio)
  assert np.max(np.abs(ratios - 1)) > 0.01
  _, metrics = run(step)
  np.testing.assert_allclose(
    metrics["objective/ratio"], (1 + np.mean(ratios)) / 2, atol=1e-5
  )
  np.testing.assert_allclose(
    metrics["drift/ratio_max"], max(1, np.max(ratios)), atol=1e-5
  )
  np.testing.assert_allclose(
    metrics["drift/kl"],
    np.mean(ratios - 1 - log_ratio) / 2,
    atol=1e-6,
  )


def test_draws_of_a_token_are_those_of_its_mini_batch_in_every_pass():
  step = make_step("tropd", mini_batches=2, epochs=2)
  keys = [
    jax.random.key_data(step.schedule(jnp.int32(2), Turn(half, time)).key)
    for half, time in ((0, 0.0), (1, 0.25), (0, 0.5), (1, 0.75))
  ]
  np.testing.assert_array_equal(keys[0], keys[2])
  np.testing.assert_array_equal(keys[1], keys[3])
  assert np.any(keys[0] != keys[1])


def test_mini_batches_have_whole_prompts_and_move_no_row():
  step = make_step("gkd", 2, mesh={"replica": 2, "tensor": 4}, devices=8)
  layout = step.scorer.student.layout
  *_, inputs, rollout = case()
  batch = jax.tree.map(
    lambda leaf: layout.place_rows(np.asarray(leaf)),
    step.scoring_batch(rollout, inputs),
  )
  program = jax.jit(step.mini_batch_parts).lower(batch).compile()
  parts = program(batch)
  for half, rows in enumerate(((0, 1, 4, 5), (2, 3, 6, 7))):
    np.testing.assert_array_equal(
      parts.tokens[half], np.asarray(rollout.tokens)[np.array(rows)]
    )
    np.testing.assert_array_equal(parts.group[half], [0, 0, 1, 1])
  for word in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
    assert word not in program.as_text()


CHANGES = {
  "micro-batches": {"micro_batches": 2, "chunk_tokens": 3},
  "devices": {"mesh": {"replica": 2, "tensor": 4}, "devices": 8},
}


@pytest.mark.parametrize(
  ("name", "change"),
  [("minillm", "micro-batches"), ("minillm", "devices"), ("tropd", "devices")],
)
def test_however_it_is_cut_or_spread(name, change):
  expected, metrics = run(make_step(name, 2, 2))
  step = make_step(name, 2, 2, **CHANGES[change])
  if change == "devices":
    state, frozen = engine.make_state(step)
    like = state_of(step)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    state = jax.device_put(jax.device_get(like), places)
    *_, inputs, rollout = case()
    found, other = jax.jit(step.update_from)(
      state, frozen, inputs, jax.device_get(rollout)
    )
  else:
    found, other = run(step)
  # Adam divides by the root of a gradient's square: noise of a weight without
  # gradient is as large as its step.
  assert_close(found.params, expected.params, atol=2e-4)
  for key in ("train/loss", "optimizer/grad_norm", "student/entropy"):
    np.testing.assert_allclose(other[key], metrics[key], rtol=1e-4)


def test_the_rate_follows_steps():
  """Warm-up, decay and the log of 10 steps, whatever the updates."""
  rate = optim.learning_rate(CONFIG, steps=10)
  gradients = {"w": jnp.ones(3)}
  for updates in (1, 4):
    optimizer = optim.build(
      dataclasses.replace(CONFIG, weight_decay=0.0, clip_norm=None),
      steps=10,
      updates=updates,
    )
    params = {"w": jnp.zeros(3)}
    state = optimizer.init(params)
    for count in range(10 * updates):
      change, state = optimizer.update(gradients, state, params)
      # Of a constant gradient Adam's step is the rate.
      np.testing.assert_allclose(change["w"], -rate(count / updates), rtol=1e-4)
  np.testing.assert_allclose(rate(0.5), 0.75e-2, rtol=1e-6)
  assert rate(1.5) == rate(1) == CONFIG.learning_rate
  np.testing.assert_allclose(
    rate(4.25), 0.5e-2 * (1 + np.cos(np.pi * 2.25 / 7)), rtol=1e-5
  )
