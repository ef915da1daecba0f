"""Frozen models as int8 and on the host: in a step, in a config, in memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import memory, parsing, sharding
from opd_jax import setup as setup_lib
from opd_jax import train as train_lib
from opd_jax.config import RunConfig
from opd_jax.errors import InputError
from opd_jax.types import Rollout
from tests import engine, pair

MESH = {"replica": 2, "fsdp": 2, "tensor": 2}


@functools.cache
def _teacher():
  """Int8 weights of the engine's teacher, and the floats they stand for."""
  teacher = engine.make_step().scorer.teacher
  int8 = dataclasses.replace(teacher, weight_dtype="int8").init(
    jax.random.key(1)
  )
  kernels = {}

  def mean(path, like):
    del like
    held = int8
    for key in path[:-1]:
      held = held[key.key]
    found = held[path[-1].key]
    if found.dtype != jnp.int8:
      return found
    kernels[path] = scale = held["kernel_scale"]
    # One dimension is contracted, but for the output of attention: two.
    inner = found.ndim - scale.ndim
    shape = (scale.shape[0], *[1] * inner, *scale.shape[1:])
    return found.astype(jnp.float32) * scale.reshape(shape)

  floats = jax.tree.map_with_path(mean, teacher.abstract_params())
  assert len(kernels) == 7
  return int8, floats


@functools.cache
def _rollout():
  random = np.random.default_rng(3)
  rows = engine.PROMPTS * engine.ROLLOUTS
  lengths = jnp.asarray(random.integers(1, engine.LENGTH + 1, rows), jnp.int32)
  mask = jnp.arange(engine.LENGTH) < lengths[:, None]
  tokens = random.integers(0, engine.STUDENT.vocab_size, mask.shape)
  prompts = engine.make_inputs().prompts
  return Rollout(
    prompts=jax.tree.map(
      lambda x: jnp.repeat(x, engine.ROLLOUTS, axis=0), prompts
    ),
    tokens=jnp.where(mask, tokens, 0).astype(jnp.int32),
    lengths=lengths,
    sampled_mask=mask,
    behavior_logprobs=jnp.zeros(mask.shape),
    stop_reason=jnp.zeros(rows, jnp.int32),
  )


@functools.cache
def _gradient(weights, spread=False, **held):
  """Losses and gradient of the student under a teacher with such weights."""
  sizes = {"mesh": MESH, "devices": 8} if spread else {}
  step = engine.make_step("gkd", **sizes)
  teacher = dataclasses.replace(step.scorer.teacher, **held)
  step = dataclasses.replace(
    step, scorer=dataclasses.replace(step.scorer, teacher=teacher)
  )
  state, _ = engine.make_state(step)
  params = jax.tree.map(
    lambda leaf, like: jax.device_put(leaf, like.sharding),
    _teacher()[weights],
    teacher.abstract_params(),
  )
  batch = step.scoring_batch(_rollout(), engine.make_inputs())
  found = jax.jit(step.gradient)(state, {"teacher": params}, batch)
  return jax.device_get((found.losses, found.gradients))


INT8, FLOATS = 0, 1
CASES = {
  "int8": (INT8, {"weight_dtype": "int8"}),
  "int8 on eight devices": (INT8, {"weight_dtype": "int8", "spread": True}),
  "offloaded on eight devices": (FLOATS, {"offload": True, "spread": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_student_learns_what_it_would_from_the_floats(case):
  weights, held = CASES[case]
  want = _gradient(FLOATS)
  assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(want)) > 1e-2
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6),
    _gradient(weights, **held),
    want,
  )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return pair.write_pair(tmp_path_factory.mktemp("frozen"))


def _config(folder, teacher, **changes):
  values = pair.config_of(folder, **changes)
  values["teacher"].update(teacher)
  return parsing.parse(RunConfig, values)


@pytest.mark.parametrize("key", ["weight_dtype", "offload"])
def test_a_config_says_how_weights_are_held(folder, key):
  """What is loaded has the memory that is foretold."""
  value = {"weight_dtype": "int8", "offload": True}[key]
  config = _config(folder, {key: value}, mesh={"fsdp": 4, "tensor": 2})
  setup = setup_lib.prepare(config)
  step = setup_lib.make_step(setup)
  frozen = train_lib.load_frozen(config, step.scorer)["teacher"]
  (part,) = (
    part
    for part in memory.estimate(step, 4, 8).parts
    if part.name == "teacher weights"
  )
  first = jax.devices()[0]
  real = sum(
    shard.data.nbytes
    for leaf in jax.tree.leaves(frozen)
    for shard in leaf.addressable_shards
    if shard.device == first
    and leaf.sharding.memory_kind != sharding.HOST_MEMORY
  )
  assert part.size == real
  kernel = frozen["layers"]["mlp"]["up"]["kernel"]
  if key == "offload":
    assert kernel.sharding.memory_kind == sharding.HOST_MEMORY
    assert kernel.dtype == jnp.float32
    assert part.formula.endswith("kernels of layers on the host")
  else:
    assert kernel.dtype == jnp.int8
    assert part.formula.endswith("kernels of layers x 1")
  for leaf in (frozen["embed"]["embedding"], frozen["final_norm"]["scale"]):
    assert leaf.sharding.memory_kind != sharding.HOST_MEMORY
    assert leaf.dtype == jnp.float32


REFUSED = {
  "both": (
    {"offload": True, "weight_dtype": "int8"},
    {},
    "bring all layers to the device",
  ),
  "a mixture": (
    {"offload": True},
    {"rollout": {"teacher_mix": 0.5}},
    r"rollout\.teacher_mix draws tokens from the teacher",
  ),
  "its accuracy": (
    {"offload": True},
    {
      "eval": {
        "source": {"path": "arith", "split": "test"},
        "teacher": True,
      }
    },
    r"eval\.teacher draws tokens from the teacher",
  ),
  "another dtype": ({"weight_dtype": "int4"}, {}, "int8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused(folder, case):
  teacher, changes, message = REFUSED[case]
  with pytest.raises(InputError, match=message):
    _config(folder, teacher, **changes)


def test_the_student_is_not_held_as_int8(folder):
  values = pair.config_of(folder)
  values["student"]["weight_dtype"] = "int8"
  with pytest.raises(InputError, match="weight_dtype"):
    parsing.parse(RunConfig, values)


def test_devices_that_cannot_read_the_host_are_named(monkeypatch):
  monkeypatch.setattr("opd_jax.models.weights.HOST_MEMORY", "no_such_memory")
  teacher = dataclasses.replace(engine.make_step().scorer.teacher, offload=True)
  with pytest.raises(InputError, match=r"cannot read the host's.*set it to Fa"):
    teacher.abstract_params()
