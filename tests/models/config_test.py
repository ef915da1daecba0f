"""Reading config.json: what is read, what is refused, what is filled in."""

import json

import pytest

from opd_jax.errors import InputError
from opd_jax.models import Experts, ModelConfig, Rope
from tests.models import tiny

LLAMA = {
  "model_type": "llama",
  "vocab_size": 105,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
}
QWEN2 = {**LLAMA, "model_type": "qwen2", "num_key_value_heads": 2}
QWEN3 = {**QWEN2, "model_type": "qwen3"}
MISTRAL = {**QWEN2, "model_type": "mistral"}
MOE = {**QWEN2, "model_type": "qwen3_moe"}
GEMMA2 = {**QWEN2, "model_type": "gemma2"}
GEMMA3 = {**QWEN2, "model_type": "gemma3_text", "num_hidden_layers": 8}
LLAMA3_SCALING = {
  "factor": 8.0,
  "high_freq_factor": 4.0,
  "low_freq_factor": 1.0,
  "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("config", tiny.CONFIGS.values(), ids=tiny.CONFIGS)
def test_to_hf_and_back(config):
  values = json.loads(json.dumps(config.to_hf()))
  assert ModelConfig.from_hf(values) == config


def test_what_a_file_leaves_out_is_the_familys_default():
  llama = ModelConfig.from_hf(LLAMA)
  assert (llama.num_kv_heads, llama.head_size) == (4, 8)
  assert (llama.norm_eps, llama.rope, llama.max_positions) == (
    1e-6,
    Rope(),
    2048,
  )
  flags = ("tie_embeddings", "qkv_bias", "output_bias", "mlp_bias", "qk_norm")
  assert not any(getattr(llama, flag) for flag in flags)
  qwen2 = ModelConfig.from_hf(QWEN2)
  assert (qwen2.qkv_bias, qwen2.output_bias, qwen2.head_size) == (
    True,
    False,
    8,
  )
  qwen3 = ModelConfig.from_hf(QWEN3)
  assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_size) == (False, True, 128)


@pytest.mark.parametrize(
  "fields",
  [
    {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3_SCALING}},
    {
      "rope_theta": 5e5,
      "rope_scaling": {"rope_type": "llama3", **LLAMA3_SCALING},
    },
    {
      "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        **LLAMA3_SCALING,
      }
    },
  ],
  ids=["old", "transformers 4", "transformers 5"],
)
def test_rope_fields_of_every_transformers_version(fields):
  assert ModelConfig.from_hf({**LLAMA, **fields}).rope == Rope(
    kind="llama3", theta=5e5, options=tuple(LLAMA3_SCALING.items())
  )


def test_files_in_the_wild_are_read():
  deepseek_distill = {
    **QWEN2,
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151646,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_window_layers": 21,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.44.0",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
  }
  assert ModelConfig.from_hf(deepseek_distill).rope.theta == 10000
  assert ModelConfig.from_hf(
    {
      **QWEN3,
      "layer_types": ["full_attention"] * 2,
      "rope_parameters": {"rope_type": "default", "rope_theta": 1000000},
      "dtype": "bfloat16",
      "quantization_config": None,
    }
  ).rope == Rope(theta=1000000)


def test_gemma_2_as_published():
  """Fields of the first files, from before there were layer types."""
  gemma = ModelConfig.from_hf(
    {
      **GEMMA2,
      "architectures": ["Gemma2ForCausalLM"],
      "attn_logit_softcapping": 50.0,
      "cache_implementation": "hybrid",
      "eos_token_id": [1, 107],
      "final_logit_softcapping": 30.0,
      "head_dim": 256,
      "hidden_act": "gelu_pytorch_tanh",
      "hidden_activation": "gelu_pytorch_tanh",
      "num_hidden_layers": 5,
      "query_pre_attn_scalar": 144,
      "rope_theta": 10000.0,
      "sliding_window": 4096,
    }
  )
  assert gemma.is_local == (True, False, True, False, True)
  assert gemma.local_layers == (True, False)
  assert (gemma.window, gemma.query_scalar) == (4096, 144)
  assert (gemma.attention_softcap, gemma.logit_softcap) == (50.0, 30.0)
  assert gemma.tie_embeddings
  assert gemma.local_rope is None
  for flag in ("norm_offset", "post_norms", "scale_embeddings"):
    assert getattr(gemma, flag)


@pytest.mark.parametrize(
  "fields",
  [
    {
      "rope_theta": 1e6,
      "rope_local_base_freq": 1e4,
      "rope_scaling": {"rope_type": "linear", "factor": 8.0},
      "sliding_window_pattern": 6,
    },
    {
      "layer_types": ["sliding_attention"] * 5
      + ["full_attention"]
      + ["sliding_attention"] * 2,
      "_sliding_window_pattern": 6,
      "rope_parameters": {
        "full_attention": {
          "rope_type": "linear",
          "factor": 8.0,
          "rope_theta": 1e6,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
      },
    },
  ],
  ids=["transformers 4", "transformers 5"],
)
def test_gemma_3_of_every_transformers_version(fields):
  gemma = ModelConfig.from_hf({**GEMMA3, "sliding_window": 512, **fields})
  assert gemma.local_layers == (True,) * 5 + (False,)
  assert gemma.is_local == (True,) * 5 + (False, True, True)
  assert gemma.rope == Rope(
    kind="linear", theta=1e6, options=(("factor", 8.0),)
  )
  assert gemma.local_rope == Rope(theta=1e4)
  assert (gemma.attention_softcap, gemma.logit_softcap) == (None, None)
  assert gemma.qk_norm


def test_mistral_is_local_in_all_layers_or_in_none():
  local = ModelConfig.from_hf(MISTRAL)
  assert (local.window, local.local_layers) == (4096, (True,))
  everywhere = ModelConfig.from_hf({**MISTRAL, "sliding_window": None})
  assert (everywhere.window, everywhere.local_layers) == (None, (False,))


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts"])
def test_a_mixture_of_every_transformers_version(name):
  moe = ModelConfig.from_hf({**MOE, name: 64, "mlp_only_layers": []})
  assert moe.experts == Experts(
    count=64, per_token=8, size=768, renormalize=False
  )
  assert (moe.head_size, moe.qk_norm) == (8, True)


REFUSED = {
  "family": (LLAMA, {"model_type": "mamba"}, "supported: llama, mistral"),
  "images": (
    LLAMA,
    {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}},
    "give a checkpoint of its text model",
  ),
  "activation": (LLAMA, {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act"),
  "unknown field": (LLAMA, {"logit_scale": 2.0}, "logit_scale"),
  "other family's field": (QWEN2, {"mlp_bias": True}, "mlp_bias"),
  "sliding window": (LLAMA, {"sliding_window": 128}, "sliding_window"),
  "use_sliding_window": (QWEN2, {"use_sliding_window": True}, "use_sliding"),
  "layer_types": (
    QWEN3,
    {"layer_types": ["full_attention", "sliding_attention"]},
    "layer_types",
  ),
  "dense layers": (MOE, {"mlp_only_layers": [0]}, "mlp_only_layers"),
  "sparse steps": (MOE, {"decoder_sparse_step": 2}, "decoder_sparse_step"),
  "too few experts": (MOE, {"num_experts": 7}, "num_experts_per_tok = 8"),
  "mistral's layer_types": (
    MISTRAL,
    {"layer_types": ["full_attention"] * 2},
    "layer_types",
  ),
  "no window": (MISTRAL, {"sliding_window": 0}, "sliding_window"),
  "local layers, no window": (GEMMA2, {"sliding_window": None}, "sliding_win"),
  "types of other layers": (
    GEMMA2,
    {"layer_types": ["full_attention"]},
    "each of the 2 layers",
  ),
  "unknown type": (
    GEMMA2,
    {"layer_types": ["full_attention", "chunked_attention"]},
    "chunked_attention",
  ),
  "gemma2's pattern": (
    GEMMA2,
    {"sliding_window_pattern": 3},
    "sliding_window_pattern",
  ),
  "gemma's activation": (GEMMA2, {"hidden_activation": "silu"}, "hidden_act"),
  "both directions": (
    GEMMA3,
    {"use_bidirectional_attention": True},
    "use_bidirectional",
  ),
  "gemma3's score cap": (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_log"),
  "cap": (GEMMA2, {"final_logit_softcapping": -1.0}, "final_logit_softcap"),
  "local scaling": (
    GEMMA3,
    {
      "rope_parameters": {
        "sliding_attention": {"rope_type": "linear", "factor": 2.0}
      }
    },
    "for sliding_attention",
  ),
  "one rope for both": (
    GEMMA3,
    {"rope_parameters": {"rope_type": "default"}},
    "sliding_attention",
  ),
  "mrope": (QWEN2, {"use_mrope": True}, "use_mrope"),
  "pretraining_tp": (LLAMA, {"pretraining_tp": 2}, "pretraining_tp"),
  "quantized": (LLAMA, {"quantization_config": {"bits": 4}}, "quantization"),
  "remote code": (LLAMA, {"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
  "partial rotary": (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary"),
  "encoder-decoder": (LLAMA, {"is_encoder_decoder": True}, "is_encoder"),
  "cross attention": (LLAMA, {"add_cross_attention": True}, "add_cross"),
  "cross size": (LLAMA, {"cross_attention_hidden_size": 8}, "cross_attention"),
  "pruned heads": (LLAMA, {"pruned_heads": {"0": [1]}}, "pruned_heads"),
  "per layer": (LLAMA, {"per_layer_config": {"0": {}}}, "per_layer_config"),
  "rope type": (LLAMA, {"rope_scaling": {"type": "dynamic"}}, "'dynamic'"),
  "rope field": (
    LLAMA,
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "mscale": 1.0}},
    "mscale",
  ),
  "rope field missing": (
    LLAMA,
    {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
    "low_freq_factor",
  ),
  "rope per layer type": (
    QWEN3,
    {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
    "full_attention",
  ),
  "rope partial": (
    LLAMA,
    {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    "partial_rotary_factor",
  ),
  "kv heads": (LLAMA, {"num_key_value_heads": 3}, "num_key_value_heads = 3"),
  "odd head": (LLAMA, {"head_dim": 7}, "head_dim = 7"),
  "no head size": (LLAMA, {"hidden_size": 30}, "give head_dim"),
  "not a size": (LLAMA, {"num_hidden_layers": 2.5}, "num_hidden_layers"),
  "not a number": (LLAMA, {"rms_norm_eps": None}, "rms_norm_eps"),
  "not a flag": (LLAMA, {"tie_word_embeddings": None}, "tie_word_embeddings"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_change_the_output_is_refused(case):
  base, fields, message = REFUSED[case]
  ModelConfig.from_hf(base)
  with pytest.raises(InputError, match=message):
    ModelConfig.from_hf({**base, **fields})


@pytest.mark.parametrize("name", ["vocab_size", "intermediate_size"])
def test_a_missing_size_is_named(name):
  values = {key: value for key, value in LLAMA.items() if key != name}
  with pytest.raises(InputError, match=name):
    ModelConfig.from_hf(values)
