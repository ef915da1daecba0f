"""Decoder-only language models: Llama 2/3, Qwen2/2.5, Qwen3."""

from opd_jax.models.api import Model
from opd_jax.models.cache import CACHE_AXES, KVCache
from opd_jax.models.config import ModelConfig, Rope

__all__ = ["CACHE_AXES", "KVCache", "Model", "ModelConfig", "Rope"]
