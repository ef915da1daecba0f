"""Tiny models of every family, with sizes that fit nothing by accident."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import sequences, sharding
from opd_jax.models import Experts, Model, ModelConfig, Rope
from opd_jax.types import PromptBatch

_LLAMA = ModelConfig(
  family="llama",
  vocab_size=105,
  hidden_size=20,
  intermediate_size=28,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  head_size=6,
  max_positions=64,
  norm_eps=1e-5,
  tie_embeddings=True,
)

_GEMMA = {
  "activation": "gelu_pytorch_tanh",
  "query_scalar": 11,
  "norm_offset": True,
  "post_norms": True,
  "scale_embeddings": True,
}

CONFIGS = {
  "llama": _LLAMA,
  "llama_biases": dataclasses.replace(
    _LLAMA,
    num_kv_heads=1,
    tie_embeddings=False,
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    rope=Rope(
      kind="llama3",
      theta=50.0,
      options=(
        ("factor", 8.0),
        ("high_freq_factor", 4.0),
        ("low_freq_factor", 1.0),
        ("original_max_position_embeddings", 8),
      ),
    ),
  ),
  "qwen2": dataclasses.replace(
    _LLAMA,
    family="qwen2",
    head_size=8,
    num_kv_heads=4,
    qkv_bias=True,
    rope=Rope(kind="linear", options=(("factor", 2.5),)),
  ),
  "qwen3": dataclasses.replace(
    _LLAMA,
    family="qwen3",
    head_size=12,
    qk_norm=True,
    tie_embeddings=False,
    rope=Rope(
      kind="yarn",
      theta=100.0,
      options=(("factor", 4.0), ("original_max_position_embeddings", 8)),
    ),
  ),
  "qwen3_moe": dataclasses.replace(
    _LLAMA,
    family="qwen3_moe",
    qk_norm=True,
    tie_embeddings=False,
    experts=Experts(count=6, per_token=3, size=12, renormalize=True),
  ),
  # Every layer is local.
  "mistral": dataclasses.replace(
    _LLAMA,
    family="mistral",
    window=4,
    local_layers=(True,),
    tie_embeddings=False,
  ),
  # The depth is no multiple of the pattern.
  "gemma2": dataclasses.replace(
    _LLAMA,
    **_GEMMA,
    family="gemma2",
    window=3,
    local_layers=(True, False),
    attention_softcap=1.5,
    logit_softcap=2.5,
  ),
  "gemma3": dataclasses.replace(
    _LLAMA,
    **_GEMMA,
    family="gemma3_text",
    num_layers=4,
    qk_norm=True,
    window=4,
    local_layers=(True, True, False),
    rope=Rope(kind="linear", theta=300.0, options=(("factor", 4.0),)),
    local_rope=Rope(theta=20.0),
  ),
}


def layout(sizes=None, rules=sharding.TRAIN_RULES):
  """A layout on as many devices as the sizes ask for; one by default."""
  sizes = sizes or {"replica": 1}
  count = int(np.prod(list(sizes.values())))
  mesh = sharding.make_mesh(sizes, jax.devices()[:count])
  return sharding.Layout.create(mesh, rules)


@functools.cache
def model(name, **fields):
  return Model(CONFIGS[name], layout(), **fields)


@functools.cache
def params(name):
  """Random weights on one device: no norm is neutral, no bias is 0."""
  random = np.random.default_rng(0)

  def draw(path, leaf):
    value = 0.3 * random.standard_normal(leaf.shape)
    if path[-1].key == "scale" and not CONFIGS[name].norm_offset:
      value += 1.0
    if path[-1].key == "embedding":
      value[CONFIGS[name].vocab_size :] = 0.0
    return jax.device_put(value.astype(np.float32), leaf.sharding)

  return jax.tree.map_with_path(draw, model(name).abstract_params())


def rows(batch=4, prompt=7, completion=5, vocab_size=105):
  """Ragged prompts and completions: (PromptBatch, ids, lengths)."""
  random = np.random.default_rng(1)
  ids = lambda length: jnp.asarray(
    random.integers(0, vocab_size, (batch, length)), jnp.int32
  )
  prompts = PromptBatch(
    tokens=ids(prompt), lengths=jnp.asarray([prompt, 1, 4, 3][:batch])
  )
  lengths = jnp.asarray([completion, 2, completion, 0][:batch])
  return prompts, ids(completion), lengths


def joined(**sizes):
  """Tokens and positions of `rows` as one array each."""
  return sequences.join(*rows(**sizes))
