"""What each family of models says in its files, and how.

A family is a description: which fields of `config.json` it has and what a
missing one means, what its models are made of without a field saying so, and
where the names of its tensors differ from Llama's. The mathematics is written
once, in `layers`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

_COMMON: Mapping[str, Any] = {
  "head_dim": None,
  "max_position_embeddings": 32768,
  "rms_norm_eps": 1e-6,
  "tie_word_embeddings": False,
  "rope_theta": 10000.0,
  "rope_scaling": None,
  "rope_parameters": None,
}
_QWEN3: Mapping[str, Any] = {
  **_COMMON,
  "num_key_value_heads": 32,
  "head_dim": 128,
  "attention_bias": False,
}
_GEMMA: Mapping[str, Any] = {
  **_COMMON,
  "num_key_value_heads": 4,
  "head_dim": 256,
  "tie_word_embeddings": True,
  "attention_bias": False,
  "query_pre_attn_scalar": 256,
  "sliding_window": 4096,
  "layer_types": None,
}

_SILU: Mapping[str, tuple[Any, ...]] = {"hidden_act": ("silu",)}
_GELU: Mapping[str, tuple[Any, ...]] = {
  "hidden_act": ("gelu_pytorch_tanh",),
  "hidden_activation": ("gelu_pytorch_tanh",),
  "use_bidirectional_attention": (False, None),
}
_FULL_ATTENTION: Mapping[str, tuple[Any, ...]] = {
  **_SILU,
  "use_sliding_window": (False, None),
}

_GEMMA_ATTRIBUTES: Mapping[str, Any] = {
  "activation": "gelu_pytorch_tanh",
  "norm_offset": True,
  "post_norms": True,
  "scale_embeddings": True,
}
_GEMMA_TENSORS: Mapping[str, str] = {
  "attention_post_norm.scale": "post_attention_layernorm.weight",
  "mlp_norm.scale": "pre_feedforward_layernorm.weight",
  "mlp_post_norm.scale": "post_feedforward_layernorm.weight",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """How models of one `model_type` are described.

  Attributes:
    architecture: class of transformers.
    defaults: fields that are read, and what a file that leaves one out means.
    supported: fields that would change the mathematics, and the values that
      leave it as it is; beside `SUPPORTED`.
    attributes: of `ModelConfig`, that all models of the family share.
    tensors: names that differ from Llama's, of a layer's parameters; {} is the
      index of an expert.
  """

  architecture: str
  defaults: Mapping[str, Any]
  supported: Mapping[str, tuple[Any, ...]]
  attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  tensors: Mapping[str, str] = dataclasses.field(default_factory=dict)


FAMILIES: Mapping[str, Family] = {
  "llama": Family(
    architecture="LlamaForCausalLM",
    defaults={
      **_COMMON,
      "num_key_value_heads": None,
      "max_position_embeddings": 2048,
      "attention_bias": False,
      "mlp_bias": False,
    },
    supported={**_FULL_ATTENTION, "sliding_window": (None,)},
  ),
  "mistral": Family(
    architecture="MistralForCausalLM",
    defaults={
      **_COMMON,
      "num_key_value_heads": 8,
      "max_position_embeddings": 131072,
      "sliding_window": 4096,
    },
    supported={**_SILU, "layer_types": (None,)},
  ),
  "qwen2": Family(
    architecture="Qwen2ForCausalLM",
    defaults={**_COMMON, "num_key_value_heads": 32},
    supported=_FULL_ATTENTION,
    attributes={"qkv_bias": True},
  ),
  "qwen3": Family(
    architecture="Qwen3ForCausalLM",
    defaults=_QWEN3,
    supported=_FULL_ATTENTION,
    attributes={"qk_norm": True},
  ),
  "qwen3_moe": Family(
    architecture="Qwen3MoeForCausalLM",
    defaults={
      **_QWEN3,
      "num_key_value_heads": 4,
      "head_dim": None,
      "num_experts": 128,
      "num_local_experts": None,
      "num_experts_per_tok": 8,
      "moe_intermediate_size": 768,
      "norm_topk_prob": False,
    },
    supported={
      **_FULL_ATTENTION,
      "decoder_sparse_step": (1,),
      "mlp_only_layers": ([], None),
    },
    attributes={"qk_norm": True},
    tensors={
      "mlp.router.kernel": "mlp.gate.weight",
      "mlp.gate.kernel": "mlp.experts.{}.gate_proj.weight",
      "mlp.up.kernel": "mlp.experts.{}.up_proj.weight",
      "mlp.down.kernel": "mlp.experts.{}.down_proj.weight",
    },
  ),
  "gemma2": Family(
    architecture="Gemma2ForCausalLM",
    defaults={
      **_GEMMA,
      "max_position_embeddings": 8192,
      "sliding_window_pattern": 2,
      "attn_logit_softcapping": 50.0,
      "final_logit_softcapping": 30.0,
    },
    supported={**_GELU, "sliding_window_pattern": (2,)},
    attributes=_GEMMA_ATTRIBUTES,
    tensors=_GEMMA_TENSORS,
  ),
  "gemma3_text": Family(
    architecture="Gemma3ForCausalLM",
    defaults={
      **_GEMMA,
      "max_position_embeddings": 131072,
      "final_logit_softcapping": None,
      "rope_theta": 1000000.0,
      "rope_local_base_freq": 10000.0,
      "sliding_window_pattern": 6,
    },
    # transformers reads the cap of the scores, and does not apply it.
    supported={**_GELU, "attn_logit_softcapping": (None,)},
    attributes={**_GEMMA_ATTRIBUTES, "qk_norm": True},
    tensors=_GEMMA_TENSORS,
  ),
}

# Fields that change the mathematics in any family, and the values that do not.
SUPPORTED: Mapping[str, tuple[Any, ...]] = {
  "partial_rotary_factor": (1.0, None),
  "pretraining_tp": (1, None),
  "quantization_config": (None,),
  "use_mrope": (False, None),
  "is_encoder_decoder": (False,),
  "add_cross_attention": (False,),
  "cross_attention_hidden_size": (None,),
  "pruned_heads": ({}, None),
  "per_layer_config": ({}, None),
  "auto_map": ({}, None),
}

# Fields that say nothing about the forward pass without dropout, which is all
# this program runs.
HARMLESS = frozenset(
  """
  _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled
  _name_or_path _sliding_window_pattern architectures attention_dropout
  begin_suppress_tokens bos_token bos_token_id cache_implementation
  chunk_size_feed_forward decoder_start_token_id dtype eos_token eos_token_id
  exponential_decay_length_penalty finetuning_task forced_bos_token_id
  forced_eos_token_id gradient_checkpointing id2label initializer_range
  is_decoder keys_to_ignore_at_inference label2id max_window_layers model_type
  num_labels output_attentions output_hidden_states output_router_logits
  pad_token pad_token_id prefix problem_type return_dict router_aux_loss_coef
  sep_token_id suppress_tokens task_specific_params tie_encoder_decoder
  tie_last_hidden_states tokenizer_class torch_dtype torchscript
  transformers_version unsloth_fixed unsloth_version use_bfloat16 use_cache
  """.split()
)
