"""Int8 kernels: their error, what they compute, where they lie."""

import dataclasses
import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import int8
from opd_jax.models import hf, placing, quantize
from tests.models import tiny

CHECKPOINTS = pathlib.Path(__file__).parents[2] / "checkpoints"
SIZES = {"expert": 2, "fsdp": 2, "tensor": 2}


def _paths(tree):
  return {
    ".".join(key.key for key in path): leaf
    for path, leaf in jax.tree.leaves_with_path(tree)
  }


def _quantized(name):
  """Int8 weights of a tiny model, and the floats that they stand for.

  By numpy: what the kernels of the layers are, kernel by kernel.
  """
  model = dataclasses.replace(tiny.model(name), weight_dtype="int8")
  floats = _paths(tiny.params(name))
  parts, meant = {}, dict(floats)
  for path, like in _paths(model.abstract_params()).items():
    if like.dtype != jnp.int8:
      parts.setdefault(path, floats.get(path))
      continue
    kernel = np.asarray(floats[path], np.float64)
    scale_path = path.replace("kernel", "kernel_scale")
    kept = _paths(model.abstract_params())[scale_path].shape
    inputs = kernel.shape[: kernel.ndim]
    lead = 2 if ".mlp." in path and tiny.CONFIGS[name].experts else 1
    contracted = tuple(range(lead, lead + len(inputs) - len(kept)))
    scale = np.abs(kernel).max(contracted, keepdims=True) / 127
    steps = np.round(kernel / scale)
    parts[path] = jnp.asarray(steps, jnp.int8)
    parts[scale_path] = jnp.asarray(scale.reshape(kept), jnp.float32)
    meant[path] = jnp.asarray(steps * np.float32(scale), jnp.float32)
  fill = lambda tree, values: jax.tree.map_with_path(
    lambda path, _: values[".".join(key.key for key in path)], tree
  )
  return (
    model,
    fill(model.abstract_params(), parts),
    fill(tiny.params(name), meant),
  )


@functools.partial(jax.jit, static_argnums=0)
def _run(model, params, tokens, positions):
  states = model.hidden(params, tokens, positions)
  return model.logits(model.split_head(params)[1], states)


def _logits(model, params):
  tokens, positions = tiny.joined()
  logits = _run(model, params, tokens, positions)
  return np.asarray(logits)[np.asarray(positions) >= 0]


def test_every_channel_is_within_half_a_step():
  kernel = np.random.default_rng(0).standard_normal((3, 20, 4, 6))
  kernel *= np.logspace(-6, 3, 6)
  kernel[1, :, 2, 3] = 0.0
  values, scale = quantize.quantize(jnp.asarray(kernel, jnp.float32), (1,))
  assert values.dtype == jnp.int8
  assert scale.shape == (3, 4, 6)
  error = np.abs(np.asarray(values) * np.asarray(scale)[:, None] - kernel)
  bound = np.abs(kernel).max(1) / 127 / 2
  assert np.all(error.max(1) <= bound * (1 + 1e-5))
  largest = np.abs(np.asarray(values)).max(1)
  assert largest[1, 2, 3] == 0
  assert np.all(np.delete(largest.reshape(-1), 24 + 2 * 6 + 3) == 127)


@pytest.mark.parametrize("name", ["llama_biases", "qwen3_moe", "gemma2"])
def test_logits_are_those_of_the_kernels_that_int8_stands_for(name):
  model, params, meant = _quantized(name)
  whole = tiny.model(name)
  held = {path for path in _paths(params) if path.endswith("kernel_scale")}
  assert not any("router" in path or "embed" in path for path in held)
  assert len(held) == 7
  got, want = _logits(model, params), _logits(whole, meant)
  np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
  # It is not the model itself.
  assert np.abs(got - _logits(whole, tiny.params(name))).max() > 1e-3


def _write(folder, config):
  from safetensors.numpy import save_file

  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(config.to_hf()))
  random = np.random.default_rng(0)
  weights = {
    tensor.name: random.standard_normal(tensor.shape).astype(np.float32)
    for tensor in hf.tensors(config)
  }
  save_file(weights, folder / "model.safetensors")


def test_a_checkpoint_is_quantized_as_it_is_read(tmp_path, monkeypatch):
  """The same numbers on one device and on eight, in one group and in three."""
  name = "qwen3_moe"
  config = tiny.CONFIGS[name]
  folder = tmp_path / "model"
  _write(folder, config)
  floats = _paths(hf.load(folder, tiny.model(name)))
  one = dataclasses.replace(tiny.model(name), weight_dtype="int8")
  spread = dataclasses.replace(one, layout=tiny.layout(SIZES))
  want = _paths(hf.load(folder, one, "bfloat16"))
  for path, leaf in want.items():
    if leaf.dtype == jnp.int8:
      scale = np.asarray(want[path.replace("kernel", "kernel_scale")])
      lead = 2 if ".mlp." in path and config.experts else 1
      shape = scale.shape[:lead] + (1,) * (leaf.ndim - scale.ndim)
      scale = scale.reshape(*shape, *scale.shape[lead:])
      error = np.abs(np.asarray(leaf) * scale - np.asarray(floats[path]))
      assert np.all(error <= scale * (0.5 + 1e-4))
    elif path.endswith("kernel_scale"):
      assert leaf.dtype == jnp.float32
    else:
      assert leaf.dtype == jnp.bfloat16
  monkeypatch.setattr(placing, "GROUP_BYTES", 1)
  got = hf.load(folder, spread, "bfloat16")
  for leaf, like in zip(
    jax.tree.leaves(got),
    jax.tree.leaves(spread.abstract_params("bfloat16")),
    strict=True,
  ):
    assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)
  jax.tree.map(np.testing.assert_array_equal, _paths(got), want)
  # And they run there as here.
  np.testing.assert_allclose(
    _logits(spread, got),
    _logits(one, hf.load(folder, one, "bfloat16")),
    atol=1e-4,
  )


@pytest.mark.parametrize("name", ["llama_biases", "qwen3_moe"])
def test_no_stack_of_kernels_is_a_float_in_the_program(name):
  """The layers are cut out of the int8 stacks first, and then cast."""
  model = dataclasses.replace(
    tiny.model(name), weight_dtype="int8", compute_dtype="bfloat16"
  )
  tokens, positions = tiny.joined()
  abstract = model.abstract_params("bfloat16")
  program = jax.jit(lambda params: model.hidden(params, tokens, positions))
  text = program.lower(abstract).compile().as_text()
  for leaf in jax.tree.leaves(abstract["layers"]):
    if leaf.dtype == jnp.int8:
      shape = ",".join(map(str, leaf.shape))
      assert f"s8[{shape}]" in text
      assert not re.search(rf"(bf16|f32)\[{shape}\]", text)


def test_a_pretrained_model_hardly_changes(shared_data):
  lines = (shared_data / "tinystories" / "valid.jsonl").read_text().splitlines()
  texts = [json.loads(line)["text"] for line in lines[:4]]
  folder = shared_data / "models" / "babyllama-teacher"
  ((_, kl, agreement),) = int8.compare(folder, texts, 64, ["int8"])
  assert 1e-6 < kl < 3e-4
  assert agreement > 0.98


def test_the_teacher_of_the_quickstart_hardly_changes():
  texts = ["8+5-9+7?8+5=13 13-9=4 4+7=11 #11", "3-1+9?3-1=2 2+9=11 #11"]
  folder = CHECKPOINTS / "arith_teacher"
  ((_, kl, agreement),) = int8.compare(folder, texts, 40, ["int8"])
  assert 0 < kl < 1e-3
  assert agreement > 0.95
