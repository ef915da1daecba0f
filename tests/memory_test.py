"""The memory of a step: exact parts against arrays that exist, all of it
against the compiler's own account."""

import collections
import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from opd_jax import memory
from opd_jax.config import RolloutConfig, SelectionConfig
from opd_jax.programs import Programs
from opd_jax.replay import Buffer
from opd_jax.selector import Selector
from opd_jax.types import PromptBatch, StepInputs
from tests import engine

MESHES = {
  "one device": ({}, 1),
  "eight": ({"replica": 2, "fsdp": 2, "tensor": 2}, 8),
  "context": ({"fsdp": 2, "context": 4}, 8),
}
PROMPTS, WINDOW = 8, engine.WINDOW
HALF = Selector(config=SelectionConfig(fraction=0.5), vocab_size=8192)


def on_first_device(tree):
  """Bytes that arrays really have on the first device."""
  return sum(
    shard.data.nbytes
    for leaf in jax.tree.leaves(tree)
    for shard in leaf.addressable_shards
    if shard.device == jax.devices()[0]
  )


def parts_of(step):
  found = memory.estimate(step, PROMPTS, WINDOW)
  return found, {part.name: part for part in found.parts}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exact_parts_are_the_sizes_of_real_arrays(mesh, dtype):
  sizes, devices = MESHES[mesh]
  step = engine.make_step(mesh=sizes, devices=devices, compute_dtype=dtype)
  found, parts = parts_of(step)
  state, frozen = engine.make_state(step)
  teacher = jax.tree.map(lambda leaf: leaf.astype(dtype), frozen["teacher"])
  rows = PROMPTS * engine.ROLLOUTS
  cache = jax.jit(
    lambda: step.decoder.init_cache(rows, WINDOW + engine.LENGTH)
  )()
  real = {
    "student weights": on_first_device(state.params),
    "optimizer state": on_first_device((state.optimizer, state.step)),
    "teacher weights": on_first_device(teacher),
    "KV cache": on_first_device(cache),
  }
  assert {name: parts[name].size for name in real} == real
  assert all(parts[name].exact for name in real)
  assert found.resident == sum(real.values()) - real["KV cache"]


def test_decode_copy_is_what_sampling_has_to_copy():
  for mesh, dtype, copied in (
    ({}, "float32", lambda name: False),
    ({}, "bfloat16", lambda name: name != "scale"),
    ({"fsdp": 4, "tensor": 2}, "float32", lambda name: name != "scale"),
  ):
    devices = math.prod(mesh.values())
    step = engine.make_step(mesh=mesh, devices=devices, compute_dtype=dtype)
    state, _ = engine.make_state(step)
    copy = jax.jit(step.decoder.working_copy)(state.params)
    real = sum(
      on_first_device(leaf)
      for path, leaf in jax.tree_util.tree_leaves_with_path(copy)
      if copied(path[-1].key)
    )
    _, parts = parts_of(step)
    assert parts["decode copy"].size == real


def enlarged(model, **changes):
  """With sizes that outweigh the small change of a compiler."""
  config = dataclasses.replace(
    model.config,
    vocab_size=8192,
    hidden_size=128,
    intermediate_size=384,
    num_layers=3,
    head_size=32,
  )
  return dataclasses.replace(model, config=config, **changes)


def enlarged_step(mesh, *, length, remat="none", **changes):
  """A step of such models, and the shapes of its frozen weights."""
  sizes, devices = MESHES[mesh]
  step = engine.make_step(mesh=sizes, devices=devices, **changes)
  student = enlarged(step.scorer.student, remat=remat)
  teacher = enlarged(step.scorer.teacher)
  step = dataclasses.replace(
    step,
    decoder=enlarged(step.decoder),
    scorer=dataclasses.replace(
      step.scorer, student=student, teacher=teacher, vocab_size=8192
    ),
    sampling=dataclasses.replace(step.sampling, max_new_tokens=length),
  )
  return step, {"teacher": teacher.abstract_params(teacher.compute_dtype)}


def abstract_prompts(step, window):
  layout = step.scorer.student.layout

  def struct(*shape):
    axes = ("batch",) + (None,) * (len(shape) - 1)
    return jax.ShapeDtypeStruct(
      shape, jnp.int32, sharding=layout.sharding(axes)
    )

  return PromptBatch(tokens=struct(PROMPTS, window), lengths=struct(PROMPTS))


@pytest.mark.parametrize(
  ("mesh", "length", "changes", "remat"),
  [
    ("one device", 96, {}, "none"),
    ("one device", 96, {"micro_batches": 4, "chunk_tokens": 128}, "full"),
    ("eight", 96, {"compute_dtype": "bfloat16"}, "none"),
    ("one device", 96, {"mini_batches": 2, "epochs": 2}, "none"),
    ("one device", 96, {"selector": HALF, "chunk_tokens": 10**6}, "full"),
    ("context", 1000, {}, "full"),
  ],
)
def test_the_whole_is_near_the_compilers_account(mesh, length, changes, remat):
  """Within 20 %: XLA decides what it fuses, keeps and recomputes."""
  step, frozen = enlarged_step(mesh, length=length, remat=remat, **changes)
  inputs = StepInputs(prompts=abstract_prompts(step, WINDOW))
  programs = Programs(step, "fused")
  programs.compile(step.abstract_state(), frozen, inputs)
  account = programs.compiled["train"].memory_analysis()
  found, _ = parts_of(step)
  # The arguments are the resident arrays and the prompts' ids.
  ids = memory.shard_bytes(inputs)
  assert found.resident + ids == pytest.approx(
    account.argument_size_in_bytes, rel=0.01
  )
  whole = account.argument_size_in_bytes + account.temp_size_in_bytes
  assert found.total == pytest.approx(whole, rel=0.2)


@pytest.mark.parametrize(
  ("mesh", "window", "length", "prefix"),
  [
    ("one device", 128, 32, "none"),
    ("one device", 128, 32, "cosine"),
    ("one device", WINDOW, 96, "cosine"),
    ("eight", 64, 256, "cosine"),
  ],
)
def test_a_rollout_is_near_the_compilers_account(mesh, window, length, prefix):
  """Within 20 % of what the prompts, and prefixes, take while they are read."""
  mixing = RolloutConfig(prefix=prefix)
  step, frozen = enlarged_step(mesh, length=length, mixing=mixing)
  inputs = StepInputs(
    prompts=abstract_prompts(step, window),
    given=None if prefix == "none" else abstract_prompts(step, length),
  )
  state = step.abstract_state()
  drawing = (state.params, frozen, state.step, inputs)
  compiled = jax.jit(step.rollout).lower(*drawing).compile()
  sizes = collections.Counter()
  for part in memory.estimate(step, PROMPTS, window).parts:
    sizes[part.phase] += part.size
  found = sizes["sampling"] + max(sizes["prefill"], sizes["decoding"])
  account = compiled.memory_analysis()
  assert found == pytest.approx(account.temp_size_in_bytes, rel=0.2)


def test_a_reference_counts():
  """Its weights, unless they are the teacher's, and the larger attention."""
  step = engine.make_step("exopd")
  plain, without = parts_of(engine.make_step("opd_k1"))
  found, parts = parts_of(step)
  _, frozen = engine.make_state(step)
  weights = parts["reference weights"]
  assert weights.size == on_first_device(frozen["reference"])
  assert weights.exact
  assert found.resident == plain.resident + weights.size
  for name in ("hidden states", "distributions of a chunk"):
    assert parts[name].size > without[name].size, name
  # Both have 4 heads and read the same slots.
  name = "attention of the teacher"
  assert parts[name].size == without[name].size
  shared = memory.estimate(step, PROMPTS, WINDOW, shared=["reference"])
  assert "reference weights" not in {part.name for part in shared.parts}
  assert shared.resident == plain.resident


def test_chosen_tokens_count():
  """The distributions of all tokens shrink to those that may be chosen."""
  plain, parts = parts_of(engine.make_step(chunk_tokens=10**6))
  step = engine.make_step(chunk_tokens=10**6, selector=HALF)
  found, fewer = parts_of(step)
  name = "distributions of a chunk"
  # 3 of 7 slots.
  assert fewer[name].size * engine.LENGTH == parts[name].size * 3
  assert found.resident == plain.resident


def test_prefixes_and_a_replay_buffer_count():
  """Prompts are longer by T and prefilled for each row; the buffer is there."""
  plain, without = parts_of(engine.make_step())
  step = engine.make_step(mixing=RolloutConfig(prefix="cosine"))
  _, parts = parts_of(step)
  rows = PROMPTS * engine.ROLLOUTS
  slots = WINDOW + 2 * engine.LENGTH
  cache = jax.jit(lambda: step.decoder.init_cache(rows, slots))()
  assert parts["KV cache"].size == on_first_device(cache)
  assert "KV cache of the prompts" in without
  assert "KV cache of the prompts" not in parts
  buffer = Buffer(capacity=50, window=WINDOW, length=engine.LENGTH)
  step = engine.make_step(replay=buffer)
  found, parts = parts_of(step)
  state, _ = engine.make_state(step)
  size = on_first_device(state.replay)
  assert parts["replay buffer"].size == size
  assert found.resident == plain.resident + size


def test_longer_prompts_of_the_teacher_count():
  step = engine.make_step()
  short = memory.estimate(step, PROMPTS, WINDOW)
  long = memory.estimate(step, PROMPTS, WINDOW, 10 * WINDOW)
  name = "attention of the teacher"
  sizes = [
    next(part.size for part in found.parts if part.name == name)
    for found in (short, long)
  ]
  # 2 x rows x heads x slots^2 x 4 bytes.
  rows = PROMPTS * engine.ROLLOUTS
  assert sizes == [
    2 * rows * 4 * (window + engine.LENGTH) ** 2 * 4
    for window in (WINDOW, 10 * WINDOW)
  ]


def test_a_large_evaluation_counts():
  step = engine.make_step()
  plain, parts = parts_of(step)
  decoding = memory.Decoding(prompts=1000, rollouts=8, window=9, length=50)
  found = memory.estimate(step, PROMPTS, WINDOW, evaluation=decoding)
  sizes = {part.name: part.size for part in found.parts}
  # 2 layers x rows x 2 kv heads x slots x 8 of keys and of values, and the
  # positions of the slots.
  slots = 1000 * 8 * 59
  assert sizes["evaluation: KV cache"] == slots * (2 * 2 * 8 * 2 * 4 + 4)
  assert sizes["evaluation: decode copy"] == parts["decode copy"].size
  assert found.total > plain.total
  assert found.total < plain.resident + 1.2 * sizes["evaluation: KV cache"]
