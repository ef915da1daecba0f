"""Given tokens in the rollout: forced, scored and learned as they are."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import sampling, sequences
from opd_jax.config import RolloutConfig, SamplingConfig
from opd_jax.sampling import given as given_lib
from opd_jax.step import rollout_metrics
from opd_jax.types import STOP_ID, STOP_LENGTH, PromptBatch, Rollout
from tests import engine

ROWS = engine.PROMPTS * engine.ROLLOUTS
PREFIX = RolloutConfig(prefix="cosine")
ROW, LENGTH = 3, engine.LENGTH
# Of the four prompts: truncated, ended by a stop id, none, a single id.
STORED = ([8, 9, 10, 12, 13, 14, 15], [20, 21, 22, 5], [], [30])


def stored():
  tokens = np.zeros((engine.PROMPTS, LENGTH), np.int32)
  for row, ids in enumerate(STORED):
    tokens[row, : len(ids)] = ids
  return PromptBatch(
    tokens=jnp.asarray(tokens),
    lengths=jnp.asarray([len(ids) for ids in STORED], jnp.int32),
  )


@functools.cache
def case(name="gkd", **changes):
  step = engine.make_step(name, **changes)
  inputs = dataclasses.replace(engine.make_inputs(), given=stored())
  return step, *engine.make_state(step), inputs


@functools.cache
def rollout_at(number, name="gkd", plain=False, **options):
  step, state, frozen, inputs = case(name, mixing=RolloutConfig(**options))
  if plain:
    inputs = dataclasses.replace(inputs, given=None)
  return jax.jit(step.rollout)(state.params, frozen, jnp.int32(number), inputs)


def equal(left, right):
  jax.tree.map(np.testing.assert_array_equal, left, right)


def test_a_prompt_goes_on_with_its_prefix():
  prompts = PromptBatch(
    tokens=jnp.array([[1, 2, 0], [3, 4, 5]]), lengths=jnp.array([2, 3])
  )
  tokens = jnp.array([[6, 7, 8], [9, 0, 0]])
  found = sequences.extend(prompts, tokens, jnp.array([2, 1]))
  equal(found.tokens, [[1, 2, 6, 7, 0, 0], [3, 4, 5, 9, 0, 0]])
  equal(found.lengths, [4, 4])
  equal(sequences.extend(prompts, tokens, jnp.zeros(2, int)).lengths, [2, 3])


@pytest.mark.parametrize(
  ("step", "expected"),
  [(0, 8096), (50, 6910.368), (100, 4048), (150, 1185.632), (200, 0)],
)
def test_worked_numbers_of_the_schedule(step, expected):
  found = given_lib.prefix_limit(8096, jnp.float32(step / 200))
  np.testing.assert_allclose(found, expected, atol=2e-3)


def test_prefixes_are_the_stored_ids():
  """At step 0 all of them; later the cosine's share of 7: 2 at 6 of 10."""
  for number, limit in ((0, 7), (6, 2), (9, 0)):
    rollout = rollout_at(number, prefix="cosine")
    for row in range(ROWS):
      ids = STORED[row // engine.ROLLOUTS][:limit]
      tokens = np.asarray(rollout.tokens[row])
      length = int(rollout.lengths[row])
      drawn = np.asarray(rollout.sampled_mask[row])
      assert tokens[: len(ids)].tolist() == ids
      expected = (np.arange(LENGTH) >= len(ids)) & (np.arange(LENGTH) < length)
      np.testing.assert_array_equal(drawn, expected)
      assert (tokens[length:] == 0).all()
      assert (np.asarray(rollout.behavior_logprobs[row])[~drawn] == 0).all()
      stops = np.isin(tokens[:length], engine.STOP_IDS)
      assert stops[:-1].sum() == 0
      assert stops[-1] == (rollout.stop_reason[row] == STOP_ID)
      # A stop id that is given ends the completion; else it goes on to T.
      if ids and ids[-1] in engine.STOP_IDS:
        assert not drawn.any()
      elif not stops[-1]:
        assert length == LENGTH


def test_nothing_given_is_todays_rollout():
  """The prompt alone decides, by the same uniforms."""
  for number in (2, 9):  # At 9 of 10 the longest prefix has 0 ids.
    plain = rollout_at(number, plain=True)
    equal(rollout_at(number, stored_fraction=0.0), plain)
    row = 2 * engine.ROLLOUTS  # Of the prompt without a stored completion.
    rows = slice(row, row + engine.ROLLOUTS)
    for options in ({"stored_fraction": 1.0}, {"prefix": "cosine"}):
      found = rollout_at(number, **options)
      equal(found.tokens[rows], plain.tokens[rows])
    equal(found.tokens, rollout_at(number, prefix="cosine").tokens)
  equal(rollout_at(9, prefix="cosine").tokens, rollout_at(9, plain=True).tokens)


def test_drawn_tokens_follow_the_prefix():
  """Their behavior is the student behind prompt and prefix, at every index."""
  step, state, frozen, inputs = case("tropd", mixing=PREFIX)
  rollout = jax.jit(step.rollout)(state.params, frozen, jnp.int32(6), inputs)
  mixed = np.asarray(rollout.sampled_mask).any(1)
  mixed &= np.asarray(rollout.lengths) > rollout.sampled_mask.sum(1)
  assert mixed.sum() >= 3
  tokens, positions = sequences.join(
    rollout.prompts, rollout.tokens, rollout.lengths
  )
  model = step.scorer.student
  states = model.hidden(state.params, tokens, positions)
  logits = model.logits(state.params, states)[:, engine.WINDOW - 1 : -1]
  logprobs = jax.nn.log_softmax(logits[..., : step.scorer.vocab_size])
  expected = jnp.take_along_axis(logprobs, rollout.tokens[..., None], axis=-1)
  expected = expected[..., 0]
  mask = rollout.sampled_mask
  np.testing.assert_allclose(
    rollout.behavior_logprobs, jnp.where(mask, expected, 0), atol=1e-5
  )
  # The scoring pass sees the same, of given tokens too.
  batch = step.scoring_batch(rollout, inputs)
  equal(batch.loss_mask & ~batch.sampled_mask, batch.loss_mask & ~mask)
  equal(batch.behavior_valid, mask)
  found = jax.jit(step.gradient)(state, frozen, batch).observed["student"]
  np.testing.assert_allclose(
    found["logprobs"], jnp.where(batch.loss_mask, expected, 0), atol=1e-5
  )


def test_a_uniform_belongs_to_an_index_not_to_a_draw():
  """A prefix that is what would have been drawn changes nothing behind it."""
  step, state, _, inputs = case(mixing=PREFIX)
  plain = rollout_at(4, plain=True)
  for cut in (1, 3):
    given = sampling.Given(
      tokens=plain.tokens,
      lengths=jnp.minimum(cut, plain.lengths),
      complete=plain.lengths <= cut,
    )
    found = sampling.complete(
      step.decoder,
      state.params,
      inputs.prompts,
      given,
      config=step.sampling,
      stop_ids=step.stop_ids,
      rollouts=step.rollouts,
      key=step._key(jnp.int32(4)),
      vocab_size=step.scorer.vocab_size,
      prefixes=True,
    )
    equal(found.tokens, plain.tokens)
    equal(found.lengths, plain.lengths)
    equal(found.stop_reason, plain.stop_reason)


@dataclasses.dataclass(frozen=True)
class Counting:
  """A decoder that notes each turn of the loop."""

  model: object
  trips: list = dataclasses.field(default_factory=list)

  def prefill(self, *arguments):
    return self.model.prefill(*arguments)

  def logits(self, *arguments):
    return self.model.logits(*arguments)

  def decode(self, *arguments):
    jax.debug.callback(lambda: self.trips.append(None))
    return self.model.decode(*arguments)


@pytest.mark.parametrize("prefixes", [False, True])
def test_a_batch_of_complete_rows_decodes_nothing(prefixes):
  step, state, _, inputs = case()
  lengths = jnp.asarray([7, 4, 1, 2] * engine.ROLLOUTS, jnp.int32)

  def run(complete):
    decoder = Counting(step.decoder)
    rollout = sampling.complete(
      decoder,
      state.params,
      inputs.prompts,
      sampling.Given(
        tokens=jnp.full((ROWS, LENGTH), 40, jnp.int32),
        lengths=lengths,
        complete=complete,
      ),
      config=SamplingConfig(max_new_tokens=LENGTH),
      stop_ids=(),
      rollouts=engine.ROLLOUTS,
      key=jax.random.key(0),
      vocab_size=step.scorer.vocab_size,
      prefixes=prefixes,
    )
    jax.effects_barrier()
    return rollout, len(decoder.trips)

  rollout, trips = run(jnp.ones(ROWS, bool))
  assert trips == 0
  assert not rollout.sampled_mask.any()
  equal(rollout.lengths, lengths)
  assert (rollout.stop_reason == STOP_LENGTH).all()
  if prefixes:
    # The row with the shortest prefix, 1 of 7, draws 6: 5 behind the first.
    assert run(jnp.zeros(ROWS, bool))[1] == LENGTH - 2


def test_the_share_of_stored_completions():
  every = PromptBatch(
    tokens=jnp.ones((200, 2), jnp.int32), lengths=jnp.full(200, 2)
  )

  def choose(seed, **options):
    return sampling.choose(
      RolloutConfig(**options),
      every,
      jnp.float32(0.5),
      jax.random.key(seed),
      (9,),
    )

  by_row = [choose(s, stored_fraction=0.3).complete.mean() for s in range(10)]
  # 2000 draws: a standard error of 0.01.
  np.testing.assert_allclose(np.mean(by_row), 0.3, atol=0.04)
  assert np.std(by_row) > 0
  scope = {"stored_fraction": 0.3, "stored_scope": "step"}
  by_step = [choose(s, **scope).complete.mean() for s in range(200)]
  assert set(map(float, by_step)) == {0.0, 1.0}
  np.testing.assert_allclose(np.mean(by_step), 0.3, atol=0.1)


def test_a_uniform_prefix_has_every_length():
  every = PromptBatch(
    tokens=jnp.ones((600, 8), jnp.int32),
    lengths=jnp.asarray([8, 2] * 300, jnp.int32),
  )
  given = sampling.choose(
    RolloutConfig(prefix="cosine", prefix_draw="uniform"),
    every,
    jnp.float32(0.5),  # At most half of 8.
    jax.random.key(0),
    (),
  )
  assert not given.complete.any()
  for lengths, most in ((given.lengths[::2], 4), (given.lengths[1::2], 2)):
    found, counts = np.unique(lengths, return_counts=True)
    assert found.tolist() == list(range(most + 1))
    # Of 300, 60 or 100 each, give or take 4 standard errors.
    np.testing.assert_allclose(counts, 300 / (most + 1), atol=34)


def test_stored_rows_are_learned_as_any_rows():
  """The gradient of plain autodiff on prompts and stored ids, by hand."""
  step, state, frozen, inputs = case()
  options = RolloutConfig(stored_fraction=1.0)
  step = dataclasses.replace(step, mixing=options, rollouts=1)
  rollout = jax.jit(step.rollout)(state.params, frozen, state.step, inputs)
  found = jax.jit(step.gradient)(
    state, frozen, step.scoring_batch(rollout, inputs)
  )
  # The third prompt has no stored completion: its tokens are drawn.
  drawn = np.asarray(rollout.tokens[2])[: int(rollout.lengths[2])].tolist()
  assert rollout.sampled_mask.any(1).tolist() == [False, False, True, False]
  befores = np.asarray(inputs.prompts.lengths).tolist()
  rows = [
    [*np.asarray(inputs.prompts.tokens[row])[:length], *ids]
    for row, (length, ids) in enumerate(
      zip(
        befores,
        (*STORED[:2], drawn, STORED[3]),
        strict=True,
      )
    )
  ]

  def loss(params):
    total, count = 0.0, 0
    for before, ids in zip(befores, rows, strict=True):
      tokens = jnp.asarray([ids], jnp.int32)
      positions = jnp.arange(len(ids))[None]

      def logprobs(role, weights, tokens=tokens, positions=positions):
        model = step.scorer.model(role)
        logits = model.logits(weights, model.hidden(weights, tokens, positions))
        return jax.nn.log_softmax(logits[0, :, : step.scorer.vocab_size])

      student = logprobs("student", params)[before - 1 : -1]
      teacher = logprobs("teacher", frozen["teacher"])[before - 1 : -1]
      total += jnp.sum(jnp.exp(student) * (student - teacher))
      count += len(ids) - before
    return total / count

  value, gradient = jax.jit(jax.value_and_grad(loss))(state.params)
  np.testing.assert_allclose(sum(found.losses.values()), value, rtol=1e-5)
  scale = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(gradient))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(1, scale)),
    found.gradients,
    gradient,
  )


@pytest.mark.parametrize("epochs", [1, 2])
def test_what_nothing_drawn_has_no_figure_of(epochs):
  """NaN, which the log leaves out; a NaN of the weights is infinite there."""
  changes = {"mixing": RolloutConfig(stored_fraction=1.0), "epochs": epochs}
  step, state, frozen, inputs = case("gkd", **changes)
  every = PromptBatch(
    tokens=jnp.full((engine.PROMPTS, LENGTH), 40, jnp.int32),
    lengths=jnp.full(engine.PROMPTS, 2),
  )
  run = jax.jit(step.train)
  drawn = {"teacher/kl", "mismatch/mean", "mismatch/max"}
  if epochs > 1:
    drawn |= {"drift/kl", "drift/ratio_max"}
  all_given = dataclasses.replace(inputs, given=every)
  _, metrics, _ = run(state, frozen, all_given)
  assert metrics["rollout/tokens"] == 0
  assert {name for name, x in metrics.items() if np.isnan(x)} == drawn
  _, metrics, _ = run(state, frozen, inputs)  # One prompt has none stored.
  assert all(np.isfinite(metrics[name]) for name in drawn)
  broken = jax.tree.map(lambda leaf: leaf * jnp.nan, state.params)
  broken = dataclasses.replace(state, params=broken)
  _, metrics, _ = run(broken, frozen, inputs)
  assert all(np.isinf(metrics[name]) for name in drawn)


@pytest.mark.parametrize(
  ("name", "options"),
  [
    ("gkd", {"stored_fraction": 0.5}),
    ("tropd", {"prefix": "cosine", "prefix_draw": "uniform"}),
  ],
)
def test_one_program_two_programs_and_eight_devices(name, options):
  mixing = RolloutConfig(**options)
  step, state, frozen, inputs = case(name, mixing=mixing)
  compiled = jax.jit(step.train).lower(state, frozen, inputs).compile()
  now, one, metrics = state, [], {}
  for _ in range(3):  # The same program as the schedule goes on.
    now, metrics, rollout = compiled(now, frozen, inputs)
    one.append(rollout)
  assert 0 < metrics["rollout/given_tokens"] < 1

  split = state
  draw, update = jax.jit(step.rollout), jax.jit(step.update_from)
  for number, expected in enumerate(one):
    rollout = draw(split.params, frozen, jnp.int32(number), inputs)
    equal(rollout.tokens, expected.tokens)
    split, _ = update(split, frozen, inputs, rollout)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
    split.params,
    now.params,
  )

  mesh = {"mesh": {"replica": 2, "fsdp": 2, "tensor": 2}, "devices": 8}
  spread = engine.make_step(name, mixing=mixing, micro_batches=2, **mesh)
  elsewhere, frozen_there = engine.make_state(spread)
  drawn = jax.jit(spread.rollout)(
    elsewhere.params, frozen_there, elsewhere.step, inputs
  )
  equal(drawn.tokens, one[0].tokens)
  equal(drawn.sampled_mask, one[0].sampled_mask)
  batch = spread.scoring_batch(jax.device_get(drawn), inputs)
  found = jax.jit(spread.gradient)(elsewhere, frozen_there, batch)
  expected = jax.jit(step.gradient)(
    state, frozen, step.scoring_batch(one[0], inputs)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
    (found.losses, found.statistics, found.gradients),
    (expected.losses, expected.statistics, expected.gradients),
  )


def test_cut_rows_are_those_that_were_drawn_in():
  """Of four rows two are stored; of the others one is cut at the limit."""
  mask = np.zeros((4, 3), bool)
  mask[2, 1:] = mask[3, :2] = True
  rollout = Rollout(
    prompts=PromptBatch(
      tokens=np.ones((4, 1), np.int32), lengths=np.ones(4, np.int32)
    ),
    tokens=np.ones((4, 3), np.int32),
    lengths=np.array([3, 2, 3, 2]),
    sampled_mask=mask,
    behavior_logprobs=np.zeros((4, 3), np.float32),
    stop_reason=np.array([STOP_LENGTH, STOP_ID, STOP_LENGTH, STOP_ID]),
  )
  assert float(rollout_metrics(rollout)["rollout/truncated"]) == 0.5
  stored = dataclasses.replace(rollout, sampled_mask=np.zeros_like(mask))
  assert float(rollout_metrics(stored)["rollout/truncated"]) == 0
