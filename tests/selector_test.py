"""Selection of tokens: TIP's numbers, and a step that runs over them alone."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from opd_jax import flops, parsing, sequences
from opd_jax.config import RunConfig, SelectionConfig
from opd_jax.errors import InputError
from opd_jax.objectives import base
from opd_jax.selector import Selector
from opd_jax.sharding import make_mesh
from tests import engine
from tests.objectives import conformance_test as enumerated
from tests.objectives import support

# The worked example of arXiv 2604.14084: one rollout of five tokens, V = 4.
STUDENT = np.array(
  [
    [0.5, 0.4, 0.3, 0.2],
    [5, 0, 0, -1],
    [6, 1, 0, 0],
    [0.5, 0.6, 0, 0.2],
    [1.5, 0, 0.5, -0.5],
  ],
  np.float32,
)
TEACHER = np.array(
  [
    [0.6, 0.3, 0.3, 0.1],
    [0, 4, 0, 0],
    [5, 1, 0, 0],
    [-1, 0, 3, 0],
    [1, 0.5, 0.5, 0],
  ],
  np.float32,
)
KEY = jax.random.key(0)


def selector_of(vocab_size=engine.STUDENT.vocab_size, **options):
  return Selector(config=SelectionConfig(**options), vocab_size=vocab_size)


def worked(**options):
  """Measures, scores and chosen slots of the worked example."""
  selector = selector_of(4, **options)
  logprobs = {
    "student": jax.nn.log_softmax(jnp.asarray(STUDENT))[None],
    "teacher": jax.nn.log_softmax(jnp.asarray(TEACHER))[None],
  }
  measures = selector.measure({role: logprobs[role] for role in selector.roles})
  mask = jnp.ones((1, 5), bool)
  scores = selector.scores(measures, mask, KEY)
  chosen = np.flatnonzero(selector.choose(scores, mask)[0])
  return measures, np.asarray(scores[0]), chosen.tolist()


@pytest.mark.parametrize(
  ("name", "fraction", "expected", "chosen", "loss"),
  [
    ("soft_or", 0.4, [1, 1, 0.001128, 0.990988, 0.798420], [0, 1], 1.966926),
    (
      "entropy",
      0.4,
      [0.995511, 0.069818, 0.053617, 0.980531, 0.800528],
      [0, 3],
      0.759214,
    ),
    ("q3", 0.2, [0, 4.603870, 0.011143, 0.018329, 0.019137], [1], 3.930173),
    (
      "divergence",
      1.0,
      [0.003679, 3.930173, 0.008109, 1.514749, 0.087955],
      [0, 1, 2, 3, 4],
      1.108933,
    ),
  ],
)
def test_worked_numbers(name, fraction, expected, chosen, loss):
  _, scores, found = worked(name=name, fraction=fraction)
  np.testing.assert_allclose(scores, expected, atol=1e-6)
  assert found == chosen
  divergence = np.asarray(worked(name="divergence")[0]["reverse_kl"][0])
  np.testing.assert_allclose(np.mean(divergence[found]), loss, atol=1e-6)


def test_worked_numbers_of_the_normalisation():
  """Of q3: 1 - h' is its score over KL(teacher || student)."""
  measures, scores, _ = worked(name="q3")
  spread = 1 - scores / np.asarray(measures["forward_kl"][0])
  np.testing.assert_allclose(
    spread, [1, 0.017223, 0, 0.985350, 0.793999], atol=2e-6
  )
  # What is above the cap is exactly 1, whatever the other factor.
  assert worked(name="soft_or")[1][:2].tolist() == [1.0, 1.0]


def test_equal_values_are_not_told_apart():
  """max = min gives 0; the first tokens are taken, one at least."""
  mask = jnp.arange(4) < jnp.array([4, 1, 0])[:, None]
  same = jnp.ones((3, 4))
  for scope in ("batch", "rollout"):
    selector = selector_of(name="soft_or", fraction=0.3, norm_scope=scope)
    measures = {"entropy": same, "reverse_kl": 2 * same}
    scores = selector.scores(measures, mask, KEY)
    np.testing.assert_array_equal(scores, 0.0)
    chosen = selector.choose(scores, mask)
    np.testing.assert_array_equal(
      chosen, (jnp.arange(4) < 1) & (jnp.arange(3) < 2)[:, None]
    )


def test_scopes():
  """Normalised by rollout, chosen over the batch."""
  rng = np.random.default_rng(0)
  mask = np.arange(9) < np.array([9, 5, 7])[:, None]
  measures = {
    name: jnp.asarray(rng.gamma(1.0, size=mask.shape), jnp.float32)
    for name in ("entropy", "forward_kl")
  }
  selector = selector_of(
    name="q3",
    fraction=0.4,
    norm_scope="rollout",
    select_scope="batch",
    cap=0.7,
  )
  found = selector.scores(measures, jnp.asarray(mask), KEY)
  measures, scores = jax.device_get((measures, found))
  for row in range(3):
    entropy = measures["entropy"][row][mask[row]]
    cut = np.minimum(entropy, np.quantile(entropy, 0.7))
    spread = (cut - cut.min()) / (cut.max() - cut.min())
    expected = measures["forward_kl"][row][mask[row]] * (1 - spread)
    np.testing.assert_allclose(scores[row][mask[row]], expected, atol=1e-6)
  chosen = np.asarray(selector.choose(found, jnp.asarray(mask)))
  assert chosen.sum() == 8  # floor(0.4 x 21)
  assert scores[chosen].min() >= scores[mask & ~chosen].max()


def test_draws_follow_the_entropy():
  """Without replacement: the chances of pairs, to four standard errors."""
  draws = 40_000
  selector = selector_of(name="entropy_sampling", fraction=0.4)
  entropy = np.array([0.1, 0.3, 0.05, 0.0, 0.2], np.float32)
  mask = jnp.ones((draws, 5), bool)
  rows = jnp.broadcast_to(entropy, (draws, 5))
  scores = jax.jit(selector.scores)({"entropy": rows}, mask, KEY)
  chosen = np.asarray(jax.jit(selector.choose)(scores, mask))
  assert (chosen.sum(axis=1) == 2).all()
  assert not chosen[:, 3].any()
  chance = entropy / entropy.sum()
  for token in (0, 1, 2, 4):
    second = sum(
      chance[other] * chance[token] / (1 - chance[other])
      for other in range(5)
      if other != token
    )
    expected = chance[token] + second
    error = 4 * math.sqrt(expected * (1 - expected) / draws)
    assert abs(chosen[:, token].mean() - expected) < error
  # The same draws where the rows lie on eight devices, others in another step.
  mesh = make_mesh({"fsdp": 8}, jax.devices()[:8])
  place = NamedSharding(mesh, PartitionSpec("fsdp", None))
  spread = jax.device_put((rows, mask), place)
  same = jax.jit(selector.scores)({"entropy": spread[0]}, spread[1], KEY)
  np.testing.assert_array_equal(same, scores)
  other = selector.scores({"entropy": rows}, mask, jax.random.key(1))
  assert np.any(selector.choose(other, mask) != chosen)


@functools.cache
def _case():
  """State, frozen weights of all roles, inputs and one rollout."""
  step = engine.make_step("exopd")
  state, frozen = engine.make_state(step)
  inputs = engine.make_inputs()
  rollout = jax.jit(step.rollout)(state.params, frozen, state.step, inputs)
  return state, frozen, inputs, rollout


@functools.cache
def _logits():
  """Logits [B, T, V] of all roles as a function of the student's weights."""
  step = engine.make_step("exopd")
  _, frozen, inputs, rollout = _case()
  batch = step.scoring_batch(rollout, inputs)

  def run(params):
    logits = {}
    for role in base.ROLES:
      privileged = role == "student_privileged"
      prompts = batch.privileged if privileged else batch.prompts
      model = step.scorer.model(role)
      weights = frozen.get(role, params)
      tokens, positions = sequences.join(prompts, batch.tokens, batch.lengths)
      hidden = model.hidden(weights, tokens, positions)
      first = prompts.tokens.shape[1] - 1
      logits[role] = model.logits(weights, hidden)[
        :, first : first + engine.LENGTH, : step.scorer.vocab_size
      ]
    return logits

  return batch, run, jax.device_get(jax.jit(run)(_case()[0].params))


def _evaluate(name, options, mesh=None, devices=1, **changes):
  step = engine.make_step(name, mesh=mesh, devices=devices, **changes)
  if options is not None:
    step = dataclasses.replace(step, selector=selector_of(**dict(options)))
  state, frozen, inputs, rollout = _case()
  if devices > 1:
    state, frozen = engine.make_state(step)
    inputs, rollout = jax.device_get((inputs, rollout))
  state = dataclasses.replace(state, objective=step.objective.init_state())
  batch = step.scoring_batch(rollout, inputs)
  return jax.jit(step.gradient)(state, frozen, batch)


_cached = functools.cache(_evaluate)


def chosen_by_hand(options, logits, mask):
  """The tokens, in float64 on the host, row by row."""
  config = SelectionConfig(**options)
  s, t = (
    np.asarray(jax.nn.log_softmax(logits[role].astype(np.float64)), np.float64)
    for role in ("student", "teacher")
  )
  h = -np.sum(np.exp(s) * s, -1) / np.log(s.shape[-1])
  d, f = np.sum(np.exp(s) * (s - t), -1), np.sum(np.exp(t) * (t - s), -1)
  cut = np.minimum(h, np.quantile(h[mask], config.cap))

  def unit(x):
    return (x - x[mask].min()) / (x[mask].max() - x[mask].min())

  scores = {
    "soft_or": unit(cut) + unit(d) - unit(cut) * unit(d),
    "q3": f * (1 - unit(cut)),
    "entropy": h,
    "divergence": d,
  }[config.name]
  chosen = np.zeros_like(mask)
  if config.select_scope == "batch":
    count = max(1, int(config.fraction * mask.sum() + 1e-6))
    order = np.argsort(-np.where(mask, scores, -np.inf), axis=None)
    chosen.ravel()[order[:count]] = True
    return chosen
  for row, length in enumerate(mask.sum(axis=1)):
    count = max(1, int(config.fraction * length + 1e-6))
    order = np.argsort(-scores[row, :length].round(9), kind="stable")
    chosen[row, order[:count]] = True
  return chosen


def _assert_close(left, right, atol=1e-6):
  sizes = (float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(left))
  scale = max([1.0, *sizes])
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol * scale),
    left,
    right,
  )


def _assert_same(left, right):
  """Evaluations are equal, and choose the same tokens.

  A score divides the rounding of entropies by max - min, a few hundredths here.
  """
  chosen = [dict(evaluation.selected) for evaluation in (left, right)]
  scores = [selected.pop("score") for selected in chosen]
  np.testing.assert_array_equal(chosen[0]["kept"], chosen[1]["kept"])
  np.testing.assert_allclose(*scores, rtol=0, atol=1e-4)
  _assert_close(
    *(
      dataclasses.replace(evaluation, selected={})
      for evaluation in (left, right)
    )
  )


CASES = [
  ("gkd", (("name", "soft_or"),)),
  ("opd_k1_discount", (("name", "entropy"),)),
  ("whole_rows", (("name", "q3"), ("fraction", 0.7))),
  ("quantile", (("name", "divergence"), ("fraction", 0.7))),
  ("exopd", (("name", "soft_or"), ("fraction", 0.3))),
  ("tropd", (("name", "q3"), ("select_scope", "batch"))),
  ("two_prompts", (("name", "entropy_sampling"),)),
]
FIRST = CASES[0]
IDS = [f"{name}-{options[0][1]}" for name, options in CASES]


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_it_is_plain_autodiff_with_the_others_masked(name, options):
  found = _cached(name, options)
  batch, run, logits = _logits()
  mask = np.asarray(batch.loss_mask)
  kept = np.asarray(found.selected["kept"]) > 0
  if dict(options)["name"] == "entropy_sampling":
    count = np.maximum(1, mask.sum(axis=1) // 2)
    np.testing.assert_array_equal(kept.sum(axis=1), count)
  else:
    np.testing.assert_array_equal(
      kept, chosen_by_hand(dict(options), logits, mask)
    )
  assert not np.any(kept & ~mask)
  step = engine.make_step(name)
  state = _case()[0]

  def loss(params):
    return support.loss_of(
      step.objective,
      run(params),
      batch.tokens,
      jnp.asarray(kept),
      jnp.where(kept, batch.behavior_logprobs, 0.0),
      state=step.objective.init_state(),
      at=step.schedule(state.step),
    )[0]

  value, gradient = jax.jit(jax.value_and_grad(loss))(state.params)
  _assert_close(sum(found.losses.values()), value)
  _assert_close(found.gradients, gradient)
  assert max(jnp.max(jnp.abs(x)) for x in jax.tree.leaves(gradient)) > 1e-3


@pytest.mark.parametrize(
  "name", ["gkd", "opd_k1", "reopold", "tropd", "whole_rows", "quantile"]
)
def test_all_tokens_are_the_whole_loss(name):
  everything = _evaluate(name, (("name", "soft_or"), ("fraction", 1.0)))
  whole = _evaluate(name, None)
  for field in ("losses", "statistics", "gradients"):
    _assert_close(getattr(everything, field), getattr(whole, field))
  assert everything.selected["kept"].sum() == _logits()[0].loss_mask.sum()


@pytest.mark.parametrize(
  ("case", "changes"),
  [
    (0, {"micro_batches": 4}),
    (2, {"micro_batches": 2}),
    (6, {"micro_batches": 4}),
    (0, {"chunk_tokens": 1}),
    (2, {"chunk_tokens": 10**6}),
  ],
)
def test_however_it_is_cut(case, changes):
  name, options = CASES[case]
  _assert_same(_evaluate(name, options, **changes), _cached(name, options))


@pytest.mark.parametrize(
  ("case", "micro_batches", "mesh"),
  [
    (0, 1, {"fsdp": 2, "tensor": 2, "context": 2}),
    (3, 2, {"replica": 2, "fsdp": 2, "tensor": 2}),
    (5, 1, {"replica": 2, "fsdp": 2, "tensor": 2}),
    (6, 2, {"fsdp": 2, "tensor": 2, "context": 2}),
  ],
)
def test_eight_devices_are_one(case, micro_batches, mesh):
  name, options = CASES[case]
  found = _evaluate(
    name,
    options,
    mesh=mesh,
    devices=8,
    micro_batches=micro_batches,
  )
  _assert_same(found, _cached(name, options))


def test_fused_is_split():
  """Draws and all; and what a step tells of the selection."""
  step = dataclasses.replace(
    engine.make_step(), selector=selector_of(name="entropy_sampling")
  )
  state, frozen, inputs, _ = _case()
  state = dataclasses.replace(state, objective={})
  frozen = {"teacher": frozen["teacher"]}
  fused, metrics, rollout = jax.jit(step.train)(state, frozen, inputs)
  drawn = jax.jit(step.rollout)(state.params, frozen, state.step, inputs)
  np.testing.assert_array_equal(drawn.tokens, rollout.tokens)
  split, told = jax.jit(step.update_from)(state, frozen, inputs, drawn)
  _assert_close(fused.params, split.params)
  _assert_close(metrics, told, atol=1e-5)
  lengths = np.asarray(jnp.sum(rollout.sampled_mask, axis=1))
  kept = np.maximum(lengths // 2, 1).sum()
  np.testing.assert_allclose(
    metrics["selection/fraction"], kept / lengths.sum(), rtol=1e-6
  )
  # The teacher is run on the chosen tokens alone.
  assert "student/entropy" in metrics
  assert not {"teacher/entropy", "teacher/kl"} & metrics.keys()


def test_metrics_are_of_all_tokens():
  name, options = FIRST
  with_it, without = (
    jax.device_get(found.observed)
    for found in (_cached(name, options), _evaluate(name, None))
  )
  _assert_close(with_it, without)


def test_a_teacher_that_only_ranks_is_one_that_runs():
  """Its objective reads no teacher; the step runs it, and times it."""
  step = engine.make_step("grpo")
  assert step.frozen_roles == ()
  ranked = dataclasses.replace(step, selector=selector_of(name="soft_or"))
  assert ranked.frozen_roles == ("teacher",)
  entropy = dataclasses.replace(step, selector=selector_of(name="entropy"))
  assert entropy.frozen_roles == ()
  read = engine.make_step("exopd", selector=selector_of(name="soft_or"))
  assert read.frozen_roles == ("teacher", "reference")
  state, frozen = engine.make_state(ranked)
  inputs = engine.make_inputs()

  def score(state, frozen):
    rollout = ranked.rollout(state.params, frozen, state.step, inputs)
    return ranked.score(frozen, ranked.scoring_batch(rollout, inputs))

  assert jax.eval_shape(score, state, frozen).keys() == {"teacher"}


def test_operations_that_are_left_out_are_not_counted():
  """2 x 2 D V for each token whose head is not differentiated."""
  sizes = {
    "prompts": 1,
    "rows": 3,
    "prompt_length": 5.0,
    "completion_length": 10.0,
  }
  count = functools.partial(
    flops.step, engine.STUDENT, (engine.TEACHER,), **sizes
  )
  head = 2 * 32 * 61
  np.testing.assert_allclose(count() - count(kept=0.4), 2 * 18 * head)
  np.testing.assert_allclose(count() - count(frozen_kept=0.4), 18 * 2 * 32 * 64)


def enumerated_gradients(name, fraction):
  """The expected gradient on tokens chosen by entropy, and the claim.

  The claim: the reverse KL at the prefixes of the chosen tokens of each
  completion, the choice and the chance of the completion fixed.
  """
  count = len(enumerated.COMPLETIONS)
  rows = np.zeros((count, enumerated.LENGTH), np.int32)
  tokens, mask = np.zeros_like(rows), np.zeros(rows.shape, bool)
  for index, completion in enumerate(enumerated.COMPLETIONS):
    for step, token in enumerate(completion):
      rows[index, step] = enumerated.ROW[completion[:step]]
      tokens[index, step], mask[index, step] = token, True
  selector = selector_of(3, name="entropy", fraction=fraction)
  with jax.enable_x64(True):
    student, world = enumerated.make_world(off_policy=False)
    case = enumerated.Case(enumerated.over_visited(enumerated.reverse_kl))
    objective = case.create(name)
    table = np.asarray(jax.nn.log_softmax(student))
    behavior = np.where(mask, table[rows, tokens], 0.0)
    chance = np.exp(behavior.sum(axis=1))
    entropy = -np.sum(np.exp(table) * table, axis=-1)[rows]
    kept = selector.choose(jnp.asarray(entropy, jnp.float32), jnp.asarray(mask))
    by_hand = np.zeros_like(mask)
    for row, length in enumerate(mask.sum(axis=1)):
      first = np.argsort(-entropy[row, :length], kind="stable")
      by_hand[row, first[: max(1, math.floor(fraction * length))]] = True
    np.testing.assert_array_equal(kept, by_hand)

    def loss(table, rows, tokens, kept, behavior):
      logits = {
        "student": table[rows][None],
        "teacher": world.teacher[rows][None],
      }
      behavior = jnp.where(kept, behavior, 0.0)[None]
      found = support.loss_of(
        objective, logits, tokens[None], kept[None], behavior
      )
      return found[0]

    def expected(table):
      losses = jax.vmap(loss, in_axes=(None, 0, 0, 0, 0))(
        table, rows, jnp.asarray(tokens), kept, jnp.asarray(behavior)
      )
      return jnp.sum(chance * losses)

    def claim(table):
      divergence = jax.vmap(enumerated.reverse_kl)(
        jax.nn.softmax(table), jax.nn.softmax(world.teacher)
      )
      return jnp.sum(chance[:, None] * by_hand * divergence[rows])

    found, claimed = (
      np.asarray(jax.jit(jax.grad(value))(student))
      for value in (expected, claim)
    )
  return found, claimed


def test_whole_distributions_descend_the_restricted_sum():
  found, claimed = enumerated_gradients("gkd", 0.5)
  np.testing.assert_allclose(found, claimed, rtol=0, atol=1e-6)
  assert np.max(np.abs(claimed)) > 1e-2


def test_drawn_tokens_descend_it_where_all_are_kept_only():
  """The choice depends on later tokens, so that k1 has a bias with it."""
  found, claimed = enumerated_gradients("opd_k1", 1.0)
  np.testing.assert_allclose(found, claimed, rtol=0, atol=1e-6)
  found, claimed = enumerated_gradients("opd_k1", 0.5)
  assert np.max(np.abs(found - claimed)) > 1e-3


@pytest.mark.parametrize(
  ("options", "parts"),
  [
    ({"fraction": 0.0}, ["selection.fraction", "(0, 1]", "0.0"]),
    ({"fraction": 1.1}, ["selection.fraction", "(0, 1]", "1.1"]),
    ({"fraction": 1e-5}, ["four decimals"]),
    ({"name": "margin"}, ["selection.name", "'q3'", "'margin'"]),
    ({"select_scope": "row"}, ["selection.select_scope", "'rollout'"]),
    ({"cap": 0.0}, ["selection.cap", "(0, 1]"]),
    ({"name": "entropy", "cap": 0.9}, ["selection.cap = 0.9", "'entropy'"]),
    ({"name": "divergence", "norm_scope": "rollout"}, ["no meaning"]),
    ({"rho": 0.5}, ["selection.rho"]),
  ],
)
def test_bad_values_are_refused(options, parts):
  values = {
    "student": {"path": "s"},
    "teacher": {"path": "t"},
    "data": {"sources": {"x": {"path": "rows.jsonl"}}},
    "objective": {"name": "gkd"},
    "steps": 1,
    "selection": options,
  }
  with pytest.raises(InputError) as caught:
    parsing.parse(RunConfig, values)
  assert all(part in str(caught.value) for part in parts), caught.value
