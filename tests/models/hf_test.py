"""Reading checkpoints: real weights, damaged folders, blocks of a mesh."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from opd_jax.errors import InputError
from opd_jax.models import Model, hf
from opd_jax.sequences import right_align
from opd_jax.types import PromptBatch
from tests.models import tiny

REAL = ("babyllama-teacher", "babyllama-student", "stories260K")


def _write(folder, config, weights, **fields):
  folder.mkdir(exist_ok=True)
  (folder / "config.json").write_text(
    json.dumps({**config.to_hf(), **fields}), encoding="utf-8"
  )
  save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _weights(config, dtype=np.float32):
  random = np.random.default_rng(0)
  return {
    tensor.name: random.standard_normal(tensor.shape).astype(dtype)
    for tensor in hf.tensors(config)
  }


@pytest.fixture
def checkpoint(tmp_path):
  """A folder of a tied llama, and its tensors."""
  config = tiny.CONFIGS["llama"]
  weights = _weights(config)
  _write(tmp_path / "model", config, weights)
  return tmp_path / "model", weights


@pytest.mark.parametrize("name", REAL)
def test_real_models_continue_greedily_as_transformers_does(shared_data, name):
  folder = shared_data / "models" / name
  reference = json.loads((folder / "reference.json").read_text("utf-8"))
  model = Model(hf.read_config(folder), tiny.layout())
  params = hf.load(folder, model)
  cases = reference["greedy"]
  window = max(len(case["prompt_ids"]) for case in cases)
  steps = len(cases[0]["completion_ids"])
  prompts = PromptBatch(
    tokens=jnp.asarray(
      [
        case["prompt_ids"] + [0] * (window - len(case["prompt_ids"]))
        for case in cases
      ]
    ),
    lengths=jnp.asarray([len(case["prompt_ids"]) for case in cases]),
  )

  @jax.jit
  def continue_greedily(params):
    tokens, positions = right_align(prompts)
    state, cache = model.prefill(params, tokens, positions, window + steps)

    def step(carry, index):
      state, cache = carry
      logprobs = jax.nn.log_softmax(model.logits(params, state))
      ids = jnp.argmax(logprobs, axis=-1)
      taken = jnp.max(logprobs, axis=-1)
      carry = model.decode(
        params, cache, ids, prompts.lengths + index, window + index
      )
      return carry, (ids, taken)

    _, (ids, taken) = jax.lax.scan(step, (state, cache), jnp.arange(steps))
    return ids.T, taken.T

  @jax.jit
  def rescore(params, ids):
    tokens, positions = right_align(prompts)
    new = prompts.lengths[:, None] + jnp.arange(steps)
    hidden = model.hidden(
      params,
      jnp.concatenate([tokens, ids], axis=1),
      jnp.concatenate([positions, new], axis=1),
    )
    logits = model.logits(params, hidden[:, window - 1 : -1])
    logprobs = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(logprobs, ids[..., None], axis=-1)[..., 0]

  ids, logprobs = continue_greedily(params)
  want_ids = np.array([case["completion_ids"] for case in cases])
  want = np.array([case["logprobs"] for case in cases])
  # The closest call between two ids is 1e-4 nats, ten times our rounding.
  np.testing.assert_array_equal(ids, want_ids)
  np.testing.assert_allclose(logprobs, want, atol=1e-4)
  np.testing.assert_allclose(rescore(params, ids), want, atol=1e-4)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_every_device_gets_its_block_of_the_transposed_weights(name, tmp_path):
  config = tiny.CONFIGS[name]
  weights = _weights(config)
  _write(tmp_path / "model", config, weights)
  sizes = {"expert": 2, "fsdp": 2, "tensor": 2}
  spread = Model(config, tiny.layout(sizes))
  params = hf.load(tmp_path / "model", spread)

  def same_place(leaf, spec):
    assert (leaf.shape, leaf.dtype) == (spec.shape, spec.dtype)
    assert leaf.sharding == spec.sharding

  jax.tree.map(same_place, params, spread.abstract_params())
  layers, last = params["layers"], config.num_layers - 1
  prefix = f"model.layers.{last}"
  heads, size = config.num_heads, config.head_size
  query = weights[f"{prefix}.self_attn.q_proj.weight"]
  output = weights[f"{prefix}.self_attn.o_proj.weight"]
  down = layers["mlp"]["down"]["kernel"][last]
  name = f"{prefix}.mlp.down_proj.weight"
  if config.experts is not None:
    down, name = down[4], f"{prefix}.mlp.experts.4.down_proj.weight"
  for got, want in (
    (
      layers["attention"]["query"]["kernel"][last],
      query.T.reshape(-1, heads, size),
    ),
    (
      layers["attention"]["output"]["kernel"][last],
      output.T.reshape(heads, size, -1),
    ),
    (down, weights[name].T),
    (
      params["embed"]["embedding"],
      np.pad(weights["model.embed_tokens.weight"], ((0, 23), (0, 0))),
    ),
  ):
    np.testing.assert_array_equal(got, want)
  if config.qkv_bias:
    np.testing.assert_array_equal(
      layers["attention"]["query"]["bias"][last],
      weights[f"{prefix}.self_attn.q_proj.bias"].reshape(heads, size),
    )


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_files_are_read_exactly(stored, tmp_path):
  config = tiny.CONFIGS["llama"]
  weights = _weights(config, stored)
  _write(tmp_path / "model", config, weights)
  params = hf.load(tmp_path / "model", tiny.model("llama"))
  np.testing.assert_array_equal(
    params["layers"]["mlp"]["up"]["kernel"][1],
    weights["model.layers.1.mlp.up_proj.weight"].astype(np.float32).T,
  )
  half = hf.load(tmp_path / "model", tiny.model("llama"), "bfloat16")
  assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(half))


def test_buffers_and_a_copy_of_the_tied_head_are_passed_over(checkpoint):
  folder, weights = checkpoint
  model = tiny.model("llama")
  want = hf.load(folder, model)
  table = weights["model.embed_tokens.weight"]
  extra = {
    **weights,
    "lm_head.weight": table,
    "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32),
  }
  save_file(extra, folder / "model.safetensors")
  jax.tree.map(np.testing.assert_array_equal, hf.load(folder, model), want)
  extra["lm_head.weight"] = table + 1
  save_file(extra, folder / "model.safetensors")
  with pytest.raises(InputError, match="tie_word_embeddings"):
    hf.load(folder, model)


def _split(folder, weights):
  """The single file as two, with an index."""
  names = sorted(weights)
  parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
  for file, part in parts.items():
    save_file({name: weights[name] for name in part}, folder / file)
  index = {
    "weight_map": {name: file for file, part in parts.items() for name in part}
  }
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  (folder / "model.safetensors").unlink()


def test_weights_in_several_files(checkpoint):
  folder, weights = checkpoint
  want = hf.load(folder, tiny.model("llama"))
  _split(folder, weights)
  got = hf.load(folder, tiny.model("llama"))
  jax.tree.map(np.testing.assert_array_equal, got, want)


def _lose_shard(folder, weights):
  _split(folder, weights)
  (folder / "b.safetensors").unlink()


def _truncate(folder, weights):
  del weights
  file = folder / "model.safetensors"
  file.write_bytes(file.read_bytes()[:-100])


def _save(change):
  def damage(folder, weights):
    change(weights)
    save_file(weights, folder / "model.safetensors")

  return damage


def _rewrite(name, value):
  return _save(lambda weights: weights.update({name: value}))


def _only_pickles(folder, weights):
  del weights
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _text(name, text):
  return lambda folder, weights: (folder / name).write_text(text)


NORM = "model.norm.weight"
DAMAGES = {
  "no config": (
    lambda folder, weights: (folder / "config.json").unlink(),
    "config.json does not exist",
  ),
  "config no JSON": (_text("config.json", "{"), "not valid JSON"),
  "config no object": (_text("config.json", "[]"), "JSON object"),
  "no weights": (
    lambda folder, weights: (folder / "model.safetensors").unlink(),
    "neither model.safetensors nor",
  ),
  "pickles": (_only_pickles, "safe_serialization=True"),
  "no weight map": (
    lambda folder, weights: (
      (folder / "model.safetensors").unlink(),
      (folder / "model.safetensors.index.json").write_text("{}"),
    ),
    "no weight_map",
  ),
  "missing file": (_lose_shard, "names b.safetensors"),
  "truncated": (_truncate, "damaged"),
  "missing tensor": (
    _save(lambda weights: weights.pop(NORM)),
    f"such as {NORM}",
  ),
  "extra tensor": (
    _rewrite("model.layers.3.mlp.up_proj.weight", np.ones((28, 20))),
    "model.layers.3.mlp.up_proj.weight",
  ),
  "wrong shape": (
    _rewrite(NORM, np.ones(19, np.float32)),
    r"shape \(19,\), but config.json asks for \(20,\)",
  ),
  "wrong dtype": (_rewrite(NORM, np.ones(20, np.int8)), "I8; supported: F32"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_folder_is_refused_by_name(checkpoint, case):
  folder, weights = checkpoint
  damage, message = DAMAGES[case]
  damage(folder, weights)
  with pytest.raises(InputError, match=message):
    hf.check(folder, hf.read_config(folder))


def test_the_cache_is_searched_by_name_and_revision(
  checkpoint, tmp_path, monkeypatch
):
  folder, _ = checkpoint
  cache = tmp_path / "hub"
  monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
  with pytest.raises(InputError, match="hf download org/tiny --revision v1"):
    hf.resolve("org/tiny@v1")
  repository = cache / "models--org--tiny"
  (repository / "refs").mkdir(parents=True)
  (repository / "refs" / "v1").write_text("abc")
  shutil.copytree(folder, repository / "snapshots" / "abc")
  assert hf.resolve("org/tiny@v1") == repository / "snapshots" / "abc"
  assert hf.read_config("org/tiny@v1") == tiny.CONFIGS["llama"]
  with pytest.raises(InputError, match="is no folder"):
    hf.resolve(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("start", [0, 96, 112])
def test_blocks_of_the_vocabulary_end_in_rows_of_zeros(checkpoint, start):
  folder, weights = checkpoint
  (tensor,) = (
    tensor
    for tensor in hf.tensors(tiny.CONFIGS["llama"])
    if tensor.parameter == "embed.embedding"
  )
  padded = np.pad(weights[tensor.name], ((0, 23), (0, 0)))
  block = slice(start, start + 16), slice(5, 10)
  with safe_open(folder / "model.safetensors", framework="numpy") as file:
    got = tensor.from_file(file.get_slice(tensor.name), block)
  np.testing.assert_array_equal(got, padded[block])


def test_only_the_needed_rows_are_read():
  """A block of a kernel is a range of rows of the file's matrix."""
  config = dataclasses.replace(tiny.CONFIGS["llama"], num_kv_heads=4)
  query = next(
    tensor
    for tensor in hf.tensors(config)
    if tensor.name == "model.layers.0.self_attn.q_proj.weight"
  )

  class Source:
    weight = np.arange(24 * 20.0).reshape(24, 20)
    asked = None

    def __getitem__(self, rows):
      self.asked = rows
      return self.weight[rows]

  source = Source()
  block = query.from_file(source, (slice(10, 20), slice(2, 4), slice(None)))
  assert source.asked == slice(12, 24)
  want = source.weight.T.reshape(20, 4, 6)[10:, 2:]
  np.testing.assert_array_equal(block, want)


def test_real_tensors_survive_the_trip_through_a_parameter(shared_data):
  folder = shared_data / "models" / "babyllama-student"
  stored = load_file(folder / "model.safetensors")
  for tensor in hf.tensors(hf.read_config(folder)):
    index = tuple(slice(0, size) for size in tensor.sizes)
    value = tensor.from_file(stored[tensor.name], index)
    assert value.shape == tensor.sizes
    np.testing.assert_array_equal(tensor.to_file(value), stored[tensor.name])
