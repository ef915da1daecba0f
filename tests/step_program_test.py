"""The compiled step: one executable, donated state, a decode loop without
gathers of weights."""

import re

import jax
import numpy as np
import pytest

from opd_jax.programs import Programs
from tests import engine

_HEADER = re.compile(r"^(?:ENTRY )?%(\S+) \(.*\{$")
_CALLED = re.compile(
  r"(?:body|condition|calls|to_apply|branch_computations)="
  r"\{?(%[\w.\-]+(?:, %[\w.\-]+)*)"
)


def _computations(text):
  """Lines of each computation of an HLO module, by name."""
  found, lines = {}, None
  for line in text.splitlines():
    header = _HEADER.match(line)
    if header:
      lines = found.setdefault(header.group(1), [])
    elif lines is not None:
      lines.append(line)
  return found


def _reachable(computations, root):
  """Lines of a computation and of all it calls."""
  seen, todo, lines = set(), [root], []
  while todo:
    name = todo.pop()
    if name in seen:
      continue
    seen.add(name)
    lines += computations[name]
    for line in computations[name]:
      for names in _CALLED.findall(line):
        todo += [called.lstrip("%") for called in names.split(", ")]
  return lines


def _decode_loops(computations):
  """Bodies of the loops that may end early: only the sampler's can."""
  return [
    re.search(r"body=%([\w.\-]+)", line).group(1)
    for lines in computations.values()
    for line in lines
    if " while(" in line and "known_trip_count" not in line
  ]


@pytest.fixture(scope="module")
def compiled():
  step = engine.make_step(
    "gkd", mesh={"replica": 2, "fsdp": 2, "tensor": 2}, devices=8
  )
  state, frozen = engine.make_state(step)
  layout = step.scorer.student.layout
  inputs = jax.tree.map(
    lambda leaf: jax.device_put(
      leaf, layout.sharding(("batch",) + (None,) * (leaf.ndim - 1))
    ),
    engine.make_inputs(privileged=False),
  )
  programs = Programs(step, "fused")
  programs.compile(state, frozen, inputs)
  return programs, state, frozen, inputs


def test_one_executable_holds_the_decode_loop(compiled):
  programs, *_ = compiled
  assert list(programs.compiled) == ["train"]
  text = programs.compiled["train"].as_text()
  assert len(_decode_loops(_computations(text))) == 1


def test_no_weight_is_gathered_inside_the_decode_loop(compiled):
  programs, *_ = compiled
  text = programs.compiled["train"].as_text()
  computations = _computations(text)
  (body,) = _decode_loops(computations)
  inside = _reachable(computations, body)
  gathers = [
    re.search(r" = (\S+\[[\d,]*\])", line).group(1)
    for line in inside
    if re.search(r" all-gather(-start)?\(", line)
  ]
  # A shard's rows x the 128 masses that the draw compares its uniform with.
  rows = engine.PROMPTS * engine.ROLLOUTS // 4
  assert set(gathers) <= {f"f32[{rows},128]"}
  others = [
    line
    for line in inside
    if re.search(r" (all-to-all|collective-permute)(-start)?\(", line)
  ]
  assert not others
  # Weights are gathered where they belong, before the loop: [L, D, N, H] of the
  # queries over fsdp, N / 2 heads staying on each tensor shard.
  assert re.search(r" = f32\[2,32,2,8\]\S* all-gather", text)


def test_no_head_gradient_is_reduced_inside_a_loop():
  """The head's, [V / 2, D] on a tensor shard, is summed behind its loop."""
  step = engine.make_step(
    "whole_rows", mesh={"fsdp": 4, "tensor": 2}, devices=8, chunk_tokens=2
  )
  state, frozen = engine.make_state(step)
  inputs = engine.make_inputs(privileged=False)

  def gradient(state, frozen, inputs):
    rollout = step.rollout(state.params, frozen, state.step, inputs)
    return step.gradient(state, frozen, step.scoring_batch(rollout, inputs))

  text = jax.jit(gradient).lower(state, frozen, inputs).compile().as_text()
  computations = _computations(text)
  bodies = re.findall(r" while\(.*body=%([\w.\-]+)", text)
  reduces = [
    line
    for body in bodies
    for line in _reachable(computations, body)
    if re.search(r" all-reduce(-start)?\(", line)
  ]
  assert reduces
  assert not [line for line in reduces if "[64,32]" in line.split("(%")[0]]


def test_it_updates_the_donated_state_and_keeps_the_teacher(compiled):
  programs, state, frozen, inputs = compiled
  before = jax.device_get(state.params["embed"]["embedding"])
  places = jax.tree.map(lambda leaf: leaf.sharding, state)
  held = jax.tree.leaves((state.params, state.optimizer))
  new_state, metrics, rollout = programs(state, frozen, inputs)
  assert all(leaf.is_deleted() for leaf in held)
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))
  assert jax.tree.map(lambda leaf: leaf.sharding, new_state) == places
  assert int(new_state.step) == 1
  assert np.any(np.asarray(new_state.params["embed"]["embedding"]) != before)
  assert float(metrics["rollout/tokens"]) == np.sum(rollout.sampled_mask)
