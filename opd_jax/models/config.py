"""What a decoder is made of, read from a Hugging Face `config.json`.

Every field that changes the mathematics is read or refused; a field this file
does not know is refused too, because it may change the mathematics.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from opd_jax.errors import InputError
from opd_jax.models.families import FAMILIES, HARMLESS, SUPPORTED

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

Value = TypeVar("Value")

_LAYER_TYPES = {"full_attention": False, "sliding_attention": True}


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
class Experts:
  """A mixture of experts in place of every MLP.

  Attributes:
    count: E.
    per_token: experts that each token runs through.
    size: F of one of them.
    renormalize: the weights of a token's experts sum to 1.
  """

  count: int
  per_token: int
  size: int
  renormalize: bool

  def __post_init__(self):
    if self.per_token > self.count:
      raise InputError(
        f"num_experts_per_tok = {self.per_token} must be at most "
        f"num_experts = {self.count}"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """A decoder: RMSNorm, grouped-query attention with rotary positions, MLP.

  Attributes:
    family: one of `families.FAMILIES`.
    vocab_size: ids the model knows.
    hidden_size: D.
    intermediate_size: F; of no use with experts in every layer.
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
    activation: of the gate in the MLP, by its Hugging Face name.
    window: tokens a local layer sees, itself included; None without one.
    local_layers: which layers are local, repeated over the depth.
    local_rope: of local layers; None for `rope`.
    query_scalar: attention scores are divided by its root; None for H.
    attention_softcap: c of c tanh(scores / c), in attention; None without.
    logit_softcap: the same on the next-token logits.
    norm_offset: RMSNorm multiplies by 1 + scale.
    post_norms: attention and MLP are normed once more before they are added.
    scale_embeddings: embeddings are multiplied by sqrt(D).
    experts: in place of the MLP; None for the MLP.
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
  activation: str = "silu"
  window: int | None = None
  local_layers: tuple[bool, ...] = (False,)
  local_rope: Rope | None = None
  query_scalar: float | None = None
  attention_softcap: float | None = None
  logit_softcap: float | None = None
  norm_offset: bool = False
  post_norms: bool = False
  scale_embeddings: bool = False
  experts: Experts | None = None

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
    if any(self.local_layers) and self.window is None:
      raise InputError(
        "sliding_window must be a whole number >= 1, got None: there are "
        "layers of the type sliding_attention"
      )

  @property
  def padded_vocab_size(self) -> int:
    """Rows of the embedding: the vocabulary, rounded up so that shards fit."""
    return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

  @property
  def is_local(self) -> tuple[bool, ...]:
    """Of each of the L layers, whether it sees no more than the window."""
    pattern = self.local_layers
    return tuple(
      pattern[layer % len(pattern)] for layer in range(self.num_layers)
    )

  @classmethod
  def from_hf(cls, values: Mapping[str, Any]) -> "ModelConfig":
    """Reads the fields of a `config.json`, of transformers 4 or 5.

    Raises:
      InputError: an unknown family, an unknown field, a missing or malformed
        one, or a value whose mathematics is not implemented.
    """
    name = values.get("model_type")
    if name not in FAMILIES:
      raise InputError(_unsupported_family(values))
    family = FAMILIES[name]
    _refuse_unsupported(name, values)
    for required in _REQUIRED:
      if required not in values:
        raise InputError(
          f"config.json has no {required}; is the file complete?"
        )
    fields = {**family.defaults, **values}
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
    rope, local_rope = _ropes(fields)
    attention_bias = _flag(fields, "attention_bias")
    attributes: dict[str, Any] = {
      "family": name,
      "vocab_size": _size(fields, "vocab_size"),
      "hidden_size": _size(fields, "hidden_size"),
      "intermediate_size": _size(fields, "intermediate_size"),
      "num_layers": _size(fields, "num_hidden_layers"),
      "num_heads": heads,
      "num_kv_heads": _size(fields, "num_key_value_heads"),
      "head_size": _size(fields, "head_dim"),
      "max_positions": _size(fields, "max_position_embeddings"),
      "norm_eps": _number(fields, "rms_norm_eps"),
      "rope": rope,
      "tie_embeddings": _flag(fields, "tie_word_embeddings"),
      "qkv_bias": attention_bias,
      "output_bias": attention_bias,
      "mlp_bias": _flag(fields, "mlp_bias"),
      "local_rope": local_rope,
      "query_scalar": _optional(_number, fields, "query_pre_attn_scalar"),
      "attention_softcap": _optional(_number, fields, "attn_logit_softcapping"),
      "logit_softcap": _optional(_number, fields, "final_logit_softcapping"),
    }
    if "sliding_window" in family.defaults:
      attributes["local_layers"] = _local_layers(fields)
      attributes["window"] = _optional(_size, fields, "sliding_window")
    if "moe_intermediate_size" in family.defaults:
      attributes["experts"] = _experts(fields)
    return cls(**{**attributes, **family.attributes})

  def to_hf(self) -> dict[str, Any]:
    """Fields that `from_hf` and transformers 4 and 5 read."""
    family = FAMILIES[self.family]
    scaling = None
    if self.rope.kind != "default":
      scaling = {"rope_type": self.rope.kind, **dict(self.rope.options)}
    values: dict[str, Any] = {
      "architectures": [family.architecture],
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
      "tie_word_embeddings": self.tie_embeddings,
      "rope_theta": self.rope.theta,
      "rope_scaling": scaling,
    }
    local_rope = self.local_rope or self.rope
    special: dict[str, Any] = {
      "attention_bias": self.output_bias,
      "mlp_bias": self.mlp_bias,
      "sliding_window": self.window,
      "layer_types": [
        "sliding_attention" if local else "full_attention"
        for local in self.is_local
      ],
      "rope_local_base_freq": local_rope.theta,
      "query_pre_attn_scalar": self.query_scalar,
      "attn_logit_softcapping": self.attention_softcap,
      "final_logit_softcapping": self.logit_softcap,
    }
    if self.experts is not None:
      special |= {
        "num_experts": self.experts.count,
        "num_experts_per_tok": self.experts.per_token,
        "moe_intermediate_size": self.experts.size,
        "norm_topk_prob": self.experts.renormalize,
      }
    values.update(
      (name, value)
      for name, value in special.items()
      if name in family.defaults
    )
    for name in ("hidden_act", "hidden_activation"):
      if name in family.supported:
        values[name] = self.activation
    return values


def _unsupported_family(values: Mapping[str, Any]) -> str:
  """Says which families there are, and what to do about this model."""
  message = (
    f"model_type = {values.get('model_type')!r} is not supported; supported: "
    f"{', '.join(FAMILIES)}"
  )
  if "text_config" in values:
    message += (
      ". This one reads more than text; give a checkpoint of its text model "
      "alone (docs/models.md says how to write one)"
    )
  return message


def _refuse_unsupported(family: str, values: Mapping[str, Any]) -> None:
  """Raises on the first field that is not read and may change the output."""
  known = FAMILIES[family]
  supported = {**SUPPORTED, **known.supported}
  for name, value in values.items():
    if name in supported:
      allowed = supported[name]
    elif name in _REQUIRED or name in known.defaults or name in HARMLESS:
      continue
    elif name == "layer_types":
      if value is None or set(value) <= {"full_attention"}:
        continue
      allowed = ("full_attention for every layer",)
    elif name == "sliding_window":
      # The Qwen families look at it only together with use_sliding_window.
      continue
    else:
      raise InputError(
        f"config.json field {name} = {value!r} is unknown for {family} and may "
        "change the model's output; remove it if it does not"
      )
    if value not in allowed:
      raise InputError(
        f"config.json field {name} = {value!r} is not supported; supported: "
        f"{', '.join(repr(option) for option in allowed)}"
      )


def _local_layers(fields: Mapping[str, Any]) -> tuple[bool, ...]:
  """The shortest pattern of local layers that says the same of all of them.

  A family without `layer_types` is local in every layer or in none.
  """
  layers = _size(fields, "num_hidden_layers")
  types = fields.get("layer_types")
  if "layer_types" not in fields:
    local = [fields["sliding_window"] is not None] * layers
  elif types is None:
    every = _size(fields, "sliding_window_pattern")
    local = [(layer + 1) % every != 0 for layer in range(layers)]
  else:
    if len(types) != layers or not set(types) <= set(_LAYER_TYPES):
      raise InputError(
        f"layer_types must name one of {', '.join(_LAYER_TYPES)} for each of "
        f"the {layers} layers, got {types!r}"
      )
    local = [_LAYER_TYPES[kind] for kind in types]
  return next(
    tuple(local[:period])
    for period in range(1, layers + 1)
    if all(local[i] == local[i % period] for i in range(layers))
  )


def _experts(fields: Mapping[str, Any]) -> Experts:
  """The mixture; transformers 5 writes the number under the second name."""
  first, second = "num_experts", "num_local_experts"
  return Experts(
    count=_size(fields, first if fields[second] is None else second),
    per_token=_size(fields, "num_experts_per_tok"),
    size=_size(fields, "moe_intermediate_size"),
    renormalize=_flag(fields, "norm_topk_prob"),
  )


def _ropes(fields: Mapping[str, Any]) -> tuple[Rope, Rope | None]:
  """The rotation, and that of local layers where the family has its own.

  Read from `rope_parameters` (transformers 5), there by the type of the layer
  if there are two, or from `rope_scaling` (before).
  """
  scaling = fields["rope_scaling"] or {}
  values = fields["rope_parameters"] or {}
  theta = _number(fields, "rope_theta")
  if "rope_local_base_freq" not in fields:
    return _rope(scaling or values, theta), None
  unknown = sorted(set(values) - set(_LAYER_TYPES))
  if unknown:
    raise InputError(
      f"rope_parameters must be given for {' and '.join(_LAYER_TYPES)}, got "
      f"{unknown[0]}"
    )
  local = _rope(
    values.get("sliding_attention") or {},
    _number(fields, "rope_local_base_freq"),
  )
  if local.kind != "default":
    raise InputError(
      f"rope_type = {local.kind!r} is not supported for sliding_attention; "
      "supported: default"
    )
  return _rope(scaling or values.get("full_attention") or {}, theta), local


def _rope(parameters: Mapping[str, Any], theta: float) -> Rope:
  """One rotation; `theta` is its base unless the parameters say another."""
  values = dict(parameters)
  legacy_kind = values.pop("type", "default")
  kind = values.pop("rope_type", legacy_kind)
  if kind not in _ROPE_OPTIONS:
    raise InputError(
      f"rope_type = {kind!r} is not supported; supported: "
      f"{', '.join(_ROPE_OPTIONS)}"
    )
  values.setdefault("rope_theta", theta)
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


def _optional(
  read: Callable[[Mapping[str, Any], str], Value],
  fields: Mapping[str, Any],
  name: str,
) -> Value | None:
  return None if fields.get(name) is None else read(fields, name)


def _flag(fields: Mapping[str, Any], name: str) -> bool:
  value = fields.get(name, False)
  if type(value) is not bool:
    raise InputError(f"{name} must be true or false, got {value!r}")
  return value
