"""What a decoder is made of, read from a Hugging Face `config.json`.

Every field that changes the mathematics is read or refused; a field this file
does not know is refused too, because it may change the mathematics.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from opd_jax.errors import InputError

VOCAB_MULTIPLE = 128

# The fields each kind of rotary scaling takes beyond its name and base; true
# for those it cannot do without.
_ROPE_OPTIONS: Mapping[str, Mapping[str, bool]] = {
  "default": {},
  "linear": {"factor": True},
  "llama3": {
    "factor": True,
    "low_freq_factor": True,
    "high_freq_factor": True,
    "original_max_position_embeddings": True,
  },
  "yarn": {
    "factor": True,
    "original_max_position_embeddings": True,
    "attention_factor": False,
    "beta_fast": False,
    "beta_slow": False,
    "truncate": False,
  },
}

_REQUIRED = (
  "vocab_size",
  "hidden_size",
  "intermediate_size",
  "num_hidden_layers",
  "num_attention_heads",
)

# What a file that leaves a field out means, per family.
_COMMON_DEFAULTS: Mapping[str, Any] = {
  "head_dim": None,
  "max_position_embeddings": 32768,
  "rms_norm_eps": 1e-6,
  "tie_word_embeddings": False,
  "rope_theta": 10000.0,
  "rope_scaling": None,
  "rope_parameters": None,
}
_FAMILY_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
  "llama": {
    **_COMMON_DEFAULTS,
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "mlp_bias": False,
  },
  "qwen2": {**_COMMON_DEFAULTS, "num_key_value_heads": 32},
  "qwen3": {
    **_COMMON_DEFAULTS,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "attention_bias": False,
  },
}

# Fields that change the mathematics, and the values that leave it alone.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
  "hidden_act": ("silu",),
  "partial_rotary_factor": (1.0, None),
  "pretraining_tp": (1, None),
  "quantization_config": (None,),
  "use_sliding_window": (False, None),
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
_HARMLESS = frozenset(
  """
  _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled
  _name_or_path architectures attention_dropout begin_suppress_tokens bos_token
  bos_token_id chunk_size_feed_forward decoder_start_token_id dtype eos_token
  eos_token_id exponential_decay_length_penalty finetuning_task
  forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label
  initializer_range is_decoder keys_to_ignore_at_inference label2id
  max_window_layers model_type num_labels output_attentions
  output_hidden_states pad_token pad_token_id prefix problem_type return_dict
  sep_token_id suppress_tokens task_specific_params tie_encoder_decoder
  tie_last_hidden_states tokenizer_class torch_dtype torchscript
  transformers_version unsloth_fixed unsloth_version use_bfloat16 use_cache
  """.split()
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
  """Rotary position embedding.

  Attributes:
    kind: "default", "linear", "llama3" or "yarn".
    theta: base of the wavelengths.
    options: the scaling's own fields under their Hugging Face names, sorted.
  """

  kind: str = "default"
  theta: float = 10000.0
  options: tuple[tuple[str, float], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """A decoder: RMSNorm, grouped-query attention with rotary positions, SwiGLU.

  Attributes:
    family: "llama", "qwen2" or "qwen3".
    vocab_size: ids the model knows.
    hidden_size: D.
    intermediate_size: F.
    num_layers: L.
    num_heads: N, of the queries.
    num_kv_heads: M, of keys and values; divides N.
    head_size: H.
    max_positions: length the model was made for.
    norm_eps: added to the mean square in RMSNorm.
    rope: rotary position embedding.
    tie_embeddings: the output layer is the embedding.
    qkv_bias: query, key and value have biases.
    output_bias: the attention output has a bias.
    mlp_bias: all three MLP products have biases.
    qk_norm: RMSNorm over H on queries and keys, before the rotation.
  """

  family: str
  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_size: int
  max_positions: int
  norm_eps: float
  rope: Rope = Rope()
  tie_embeddings: bool = False
  qkv_bias: bool = False
  output_bias: bool = False
  mlp_bias: bool = False
  qk_norm: bool = False

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise InputError(
        f"num_key_value_heads = {self.num_kv_heads} must divide "
        f"num_attention_heads = {self.num_heads}"
      )
    if self.head_size % 2:
      raise InputError(
        f"head_dim = {self.head_size} must be even: rotary positions turn pairs"
      )

  @property
  def padded_vocab_size(self) -> int:
    """Rows of the embedding: the vocabulary, rounded up so that shards fit."""
    return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

  @classmethod
  def from_hf(cls, values: Mapping[str, Any]) -> "ModelConfig":
    """Reads the fields of a `config.json`, of transformers 4 or 5.

    Raises:
      InputError: an unknown family, an unknown field, a missing or malformed
        one, or a value whose mathematics is not implemented.
    """
    family = values.get("model_type")
    if family not in _FAMILY_DEFAULTS:
      raise InputError(
        f"model_type = {family!r} is not supported; supported: "
        f"{', '.join(_FAMILY_DEFAULTS)}"
      )
    _refuse_unsupported(family, values)
    for name in _REQUIRED:
      if name not in values:
        raise InputError(f"config.json has no {name}; is the file complete?")
    fields = {**_FAMILY_DEFAULTS[family], **values}
    heads = _size(fields, "num_attention_heads")
    if fields["num_key_value_heads"] is None:
      fields["num_key_value_heads"] = heads
    if fields["head_dim"] is None:
      if _size(fields, "hidden_size") % heads:
        raise InputError(
          f"hidden_size = {fields['hidden_size']} is not a multiple of "
          f"num_attention_heads = {heads}; give head_dim"
        )
      fields["head_dim"] = fields["hidden_size"] // heads
    attention_bias = _flag(fields, "attention_bias")
    return cls(
      family=family,
      vocab_size=_size(fields, "vocab_size"),
      hidden_size=_size(fields, "hidden_size"),
      intermediate_size=_size(fields, "intermediate_size"),
      num_layers=_size(fields, "num_hidden_layers"),
      num_heads=heads,
      num_kv_heads=_size(fields, "num_key_value_heads"),
      head_size=_size(fields, "head_dim"),
      max_positions=_size(fields, "max_position_embeddings"),
      norm_eps=_number(fields, "rms_norm_eps"),
      rope=_rope(fields),
      tie_embeddings=_flag(fields, "tie_word_embeddings"),
      qkv_bias=attention_bias or family == "qwen2",
      output_bias=attention_bias,
      mlp_bias=_flag(fields, "mlp_bias"),
      qk_norm=family == "qwen3",
    )

  def to_hf(self) -> dict[str, Any]:
    """Fields that `from_hf` and transformers 4 and 5 read."""
    values: dict[str, Any] = {
      "architectures": [f"{self.family.capitalize()}ForCausalLM"],
      "model_type": self.family,
      "vocab_size": self.vocab_size,
      "hidden_size": self.hidden_size,
      "intermediate_size": self.intermediate_size,
      "num_hidden_layers": self.num_layers,
      "num_attention_heads": self.num_heads,
      "num_key_value_heads": self.num_kv_heads,
      "head_dim": self.head_size,
      "max_position_embeddings": self.max_positions,
      "rms_norm_eps": self.norm_eps,
      "hidden_act": "silu",
      "tie_word_embeddings": self.tie_embeddings,
      "rope_theta": self.rope.theta,
      "rope_scaling": None,
    }
    if self.rope.kind != "default":
      values["rope_scaling"] = {
        "rope_type": self.rope.kind,
        **dict(self.rope.options),
      }
    known = _FAMILY_DEFAULTS[self.family]
    if "attention_bias" in known:
      values["attention_bias"] = self.output_bias
    if "mlp_bias" in known:
      values["mlp_bias"] = self.mlp_bias
    return values


def _refuse_unsupported(family: str, values: Mapping[str, Any]) -> None:
  """Raises on the first field that is not read and may change the output."""
  for name, value in values.items():
    if (
      name in _REQUIRED or name in _FAMILY_DEFAULTS[family] or name in _HARMLESS
    ):
      continue
    if name in _NEUTRAL:
      supported = _NEUTRAL[name]
    elif name == "layer_types":
      if value is None or set(value) <= {"full_attention"}:
        continue
      supported = ("full_attention for every layer",)
    elif name == "sliding_window":
      # The Qwen families look at it only together with use_sliding_window.
      supported = (None,) if family == "llama" else (value,)
    else:
      raise InputError(
        f"config.json field {name} = {value!r} is unknown for {family} and may "
        "change the model's output; remove it if it does not"
      )
    if value not in supported:
      raise InputError(
        f"config.json field {name} = {value!r} is not supported; supported: "
        f"{', '.join(repr(option) for option in supported)}"
      )


def _rope(fields: Mapping[str, Any]) -> Rope:
  """Reads `rope_parameters` (transformers 5) or `rope_scaling` (before)."""
  values = dict(fields["rope_scaling"] or fields["rope_parameters"] or {})
  legacy_kind = values.pop("type", "default")
  kind = values.pop("rope_type", legacy_kind)
  if kind not in _ROPE_OPTIONS:
    raise InputError(
      f"rope_type = {kind!r} is not supported; supported: "
      f"{', '.join(_ROPE_OPTIONS)}"
    )
  values.setdefault("rope_theta", fields["rope_theta"])
  theta = _number(values, "rope_theta")
  del values["rope_theta"]
  if values.pop("partial_rotary_factor", 1.0) != 1.0:
    raise InputError(
      "partial_rotary_factor must be 1: all of a head is rotated"
    )
  for name, needed in _ROPE_OPTIONS[kind].items():
    if needed and name not in values:
      raise InputError(f"rope_type {kind!r} needs the field {name}")
  options = []
  for name in sorted(values):
    if name not in _ROPE_OPTIONS[kind]:
      raise InputError(
        f"rope field {name} = {values[name]!r} is not supported with rope_type "
        f"{kind!r}; supported: {', '.join(_ROPE_OPTIONS[kind]) or 'none'}"
      )
    read = _flag if name == "truncate" else _number
    options.append((name, read(values, name)))
  return Rope(kind=kind, theta=theta, options=tuple(options))


def _size(fields: Mapping[str, Any], name: str) -> int:
  value = fields[name]
  if type(value) is not int or value < 1:
    raise InputError(f"{name} must be a whole number >= 1, got {value!r}")
  return value


def _number(fields: Mapping[str, Any], name: str) -> float:
  value = fields[name]
  if type(value) not in (int, float) or not value > 0:
    raise InputError(f"{name} must be a number > 0, got {value!r}")
  return value


def _flag(fields: Mapping[str, Any], name: str) -> bool:
  value = fields.get(name, False)
  if type(value) is not bool:
    raise InputError(f"{name} must be true or false, got {value!r}")
  return value
