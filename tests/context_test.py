"""A step whose rows are spread over the mesh axis "context": what one device
draws and learns, and what the compiled program moves."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from opd_jax.sharding import Layout
from tests import engine
from tests.models import tiny
from tests.step_program_test import _computations, _decode_loops, _reachable

STUDENTS = {
  "qwen3": engine.STUDENT,
  # Windows of 4 tokens in two of three layers.
  "gemma3": dataclasses.replace(
    tiny.CONFIGS["gemma3"], vocab_size=engine.STUDENT.vocab_size
  ),
}
# Of the spread one: recomputation changes no gradient.
REMAT = {"qwen3": "none", "gemma3": "dots"}
# Neither 6 + 7 slots nor 7 tokens divide.
SPREAD = {"mesh": {"fsdp": 2, "tensor": 2, "context": 2}, "devices": 8}


def _step(name, **options):
  # Chunks of a token per shard: the loop over the vocabulary turns often.
  step = engine.make_step("gkd", chunk_tokens=4, **options)
  remat = REMAT[name] if options else "none"
  of = lambda model: dataclasses.replace(
    model, config=STUDENTS[name], remat=remat
  )
  return dataclasses.replace(
    step,
    decoder=of(step.decoder),
    scorer=dataclasses.replace(step.scorer, student=of(step.scorer.student)),
  )


@functools.cache
def _compiled(name, spread):
  """A step's rollout and gradient as one program, and its arguments."""
  step = _step(name, **(SPREAD if spread else {}))
  state, frozen = engine.make_state(step)
  inputs = engine.make_inputs(privileged=False)

  def run(state, frozen, inputs):
    rollout = step.rollout(state.params, frozen, state.step, inputs)
    batch = step.scoring_batch(rollout, inputs)
    return rollout, step.gradient(state, frozen, batch)

  program = jax.jit(run).lower(state, frozen, inputs).compile()
  return step, program, (state, frozen, inputs)


@pytest.mark.parametrize("name", STUDENTS)
def test_eight_devices_draw_and_learn_what_one_does(name):
  (rollout, one), (drawn, eight) = (
    program(*arguments)
    for _, program, arguments in (_compiled(name, False), _compiled(name, True))
  )
  np.testing.assert_array_equal(drawn.tokens, rollout.tokens)
  np.testing.assert_array_equal(drawn.lengths, rollout.lengths)
  assert np.sum(rollout.sampled_mask) > 20
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    jax.device_get((eight.gradients, eight.losses)),
    jax.device_get((one.gradients, one.losses)),
  )


def _gathers(lines):
  """Sizes of what is gathered or exchanged, without dimensions of one."""
  found = set()
  for line in lines:
    moved = re.search(
      r" = \(?\w+\[([\d,]*)\].* (?:all-gather|all-to-all|collective-permute)"
      r"(?:-start)?\(",
      line,
    )
    if moved:
      found.add(_sorted(map(int, moved.group(1).split(","))))
  return found


def _sorted(shape):
  return tuple(sorted(size for size in shape if size > 1))


def test_layers_gather_weights_keys_and_values_alone():
  step, program, _ = _compiled("qwen3", True)
  computations = _computations(program.as_text())
  (decoding,) = _decode_loops(computations)
  inside = {
    body: _reachable(computations, body)
    for lines in computations.values()
    for line in lines
    for body in re.findall(r" while\(.*body=%([\w.\-]+)", line)
  }
  rows = engine.PROMPTS * engine.ROLLOUTS // 2
  # The masses that a draw compares its uniform with.
  assert _gathers(inside[decoding]) == {(rows, 128)}
  allowed = {(rows, 128)}
  for model in (step.scorer.student, step.scorer.teacher):
    rules = {**dict(model.layout.rules), "embed": None}
    whole = Layout.create(model.layout.mesh, rules)
    places = whole.tree_shardings(
      model.logical_axes()["layers"], model.abstract_params()["layers"]
    )
    allowed |= {
      _sorted(place.shard_shape(leaf.shape)[1:])
      for leaf, place in zip(
        jax.tree.leaves(model.abstract_params()["layers"]),
        jax.tree.leaves(places),
        strict=True,
      )
    }
    # 13 slots are 16 in the places of two shards' runs, of prompts 6 are 8.
    heads = model.config.num_kv_heads // 2
    for count, slots in ((rows, 16), (rows // engine.ROLLOUTS, 8)):
      allowed.add(_sorted((count, heads, slots, model.config.head_size)))
  gathered = set().union(*map(_gathers, inside.values()))
  assert _sorted((rows, 16, step.decoder.config.head_size)) in gathered
  assert gathered <= allowed


def test_the_heads_gradient_is_summed_behind_its_loop():
  """[V / tensor, D]: over the shards of the batch and of the sequence."""
  _, program, _ = _compiled("qwen3", True)
  text = program.as_text()
  computations = _computations(text)
  for body in re.findall(r" while\(.*body=%([\w.\-]+)", text):
    for line in _reachable(computations, body):
      if re.search(r" (all-reduce|reduce-scatter)(-start)?\(", line):
        assert "[64,32]" not in line.split("(%")[0]
