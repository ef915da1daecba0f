"""Architectures of public checkpoints, for what needs no weights.

The fields of their `config.json` that say something about the forward pass, as
their authors published them. A checkpoint that is at hand is always read
instead: see `hf.read_config`.
"""

from collections.abc import Mapping
from typing import Any

from opd_jax.errors import InputError
from opd_jax.models import hf
from opd_jax.models.config import ModelConfig

_QWEN3: Mapping[str, Any] = {
  "model_type": "qwen3",
  "head_dim": 128,
  "max_position_embeddings": 40960,
  "num_key_value_heads": 8,
  "rms_norm_eps": 1e-6,
  "rope_theta": 1000000,
  "vocab_size": 151936,
}
_QWEN2: Mapping[str, Any] = {
  "model_type": "qwen2",
  "max_position_embeddings": 32768,
  "rms_norm_eps": 1e-6,
  "rope_theta": 1000000.0,
}
_LLAMA3: Mapping[str, Any] = {
  "model_type": "llama",
  "max_position_embeddings": 131072,
  "num_key_value_heads": 8,
  "rms_norm_eps": 1e-5,
  "rope_scaling": {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
  },
  "rope_theta": 500000.0,
  "vocab_size": 128256,
}
_GEMMA2: Mapping[str, Any] = {
  "model_type": "gemma2",
  "attn_logit_softcapping": 50.0,
  "final_logit_softcapping": 30.0,
  "max_position_embeddings": 8192,
  "query_pre_attn_scalar": 256,
  "rms_norm_eps": 1e-6,
  "rope_theta": 10000.0,
  "sliding_window": 4096,
  "vocab_size": 256000,
}


def _sizes(
  hidden: int, inner: int, layers: int, heads: int, **others: Any
) -> Mapping[str, Any]:
  return {
    "hidden_size": hidden,
    "intermediate_size": inner,
    "num_hidden_layers": layers,
    "num_attention_heads": heads,
    **others,
  }


_TIED = {"tie_word_embeddings": True}

_FAMILY_OF_LLAMA3 = {
  "3.1-8B": _sizes(4096, 14336, 32, 32),
  "3.1-70B": _sizes(8192, 28672, 80, 64),
  "3.2-1B": {
    **_sizes(2048, 8192, 16, 32, head_dim=64, **_TIED),
    "rope_scaling": {**_LLAMA3["rope_scaling"], "factor": 32.0},
  },
}
_FAMILY_OF_QWEN2 = {
  "1.5B": _sizes(
    1536, 8960, 28, 12, num_key_value_heads=2, vocab_size=151936, **_TIED
  ),
  "7B": _sizes(3584, 18944, 28, 28, num_key_value_heads=4, vocab_size=152064),
  "32B": _sizes(5120, 27648, 64, 40, num_key_value_heads=8, vocab_size=152064),
}
_FAMILY_OF_GEMMA2 = {
  "2b": _sizes(2304, 9216, 26, 8, num_key_value_heads=4, head_dim=256),
  "9b": _sizes(3584, 14336, 42, 16, num_key_value_heads=8, head_dim=256),
  "27b": _sizes(
    4608,
    36864,
    46,
    32,
    num_key_value_heads=16,
    head_dim=128,
    query_pre_attn_scalar=144,
  ),
}

# Where both are named, a tuned model has the architecture of its base model.
PUBLISHED: Mapping[str, Mapping[str, Any]] = {
  "Qwen/Qwen3-0.6B": {**_QWEN3, **_sizes(1024, 3072, 28, 16, **_TIED)},
  "Qwen/Qwen3-1.7B": {**_QWEN3, **_sizes(2048, 6144, 28, 16, **_TIED)},
  "Qwen/Qwen3-4B": {**_QWEN3, **_sizes(2560, 9728, 36, 32, **_TIED)},
  "Qwen/Qwen3-8B": {**_QWEN3, **_sizes(4096, 12288, 36, 32)},
  "Qwen/Qwen3-14B": {**_QWEN3, **_sizes(5120, 17408, 40, 40)},
  "Qwen/Qwen3-32B": {**_QWEN3, **_sizes(5120, 25600, 64, 64)},
  "Qwen/Qwen3-30B-A3B": {
    **_QWEN3,
    **_sizes(2048, 6144, 48, 32),
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
  },
  **{
    f"Qwen/Qwen2.5-{size}-Instruct": {**_QWEN2, **values}
    for size, values in _FAMILY_OF_QWEN2.items()
  },
  **{
    f"meta-llama/Llama-{size}{tuned}": {**_LLAMA3, **values}
    for size, values in _FAMILY_OF_LLAMA3.items()
    for tuned in ("", "-Instruct")
  },
  **{
    f"google/gemma-2-{size}{tuned}": {**_GEMMA2, **values}
    for size, values in _FAMILY_OF_GEMMA2.items()
    for tuned in ("", "-it")
  },
  **{
    f"google/gemma-3-1b-{tuned}": {
      "model_type": "gemma3_text",
      **_sizes(1152, 6912, 26, 4, num_key_value_heads=1, head_dim=256),
      "max_position_embeddings": 32768,
      "query_pre_attn_scalar": 256,
      "rms_norm_eps": 1e-6,
      "rope_local_base_freq": 10000,
      "rope_theta": 1000000,
      "sliding_window": 512,
      "sliding_window_pattern": 6,
      "vocab_size": 262144,
    }
    for tuned in ("pt", "it")
  },
}


def architecture(path: str) -> ModelConfig:
  """That of a checkpoint at hand, or else of a public one by its name.

  Args:
    path: as for `hf.resolve`.

  Raises:
    InputError: neither is known, or a `config.json` that is not supported.
  """
  try:
    folder = hf.resolve(path)
  except InputError as error:
    name, _, revision = path.partition("@")
    if name in PUBLISHED and not revision:
      return ModelConfig.from_hf(PUBLISHED[name])
    raise InputError(
      f"{error}; its config.json is enough here: hf download {path} config.json"
    ) from error
  return hf.read_config(folder)
