"""Decoder-only language models: Llama, Mistral, Qwen, Gemma."""

from opd_jax.models.api import Model
from opd_jax.models.cache import CACHE_AXES, KVCache
from opd_jax.models.config import Experts, ModelConfig, Rope
from opd_jax.models.lora import Lora

__all__ = [
  "CACHE_AXES",
  "Experts",
  "KVCache",
  "Lora",
  "Model",
  "ModelConfig",
  "Rope",
]
