"""Hugging Face checkpoints: names, shapes, and reading into place."""

import contextlib
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from opd_jax import storage
from opd_jax.errors import InputError
from opd_jax.models import placing, quantize, tensor_files, transformer
from opd_jax.models.api import Model
from opd_jax.models.config import ModelConfig
from opd_jax.models.families import FAMILIES
from opd_jax.models.placing import Index
from opd_jax.models.tensor_files import Stored
from opd_jax.storage import AnyPath
from opd_jax.types import Params

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Parameter -> name of its tensor.
_NAMES: Mapping[str, str] = {
  "embed.embedding": "model.embed_tokens.weight",
  "final_norm.scale": "model.norm.weight",
  "lm_head.embedding": "lm_head.weight",
}
# The same below "layers." here and "model.layers.<index>." there; families
# say where they differ.
_LAYER_NAMES: Mapping[str, str] = {
  "attention_norm.scale": "input_layernorm.weight",
  "attention.query.kernel": "self_attn.q_proj.weight",
  "attention.query.bias": "self_attn.q_proj.bias",
  "attention.key.kernel": "self_attn.k_proj.weight",
  "attention.key.bias": "self_attn.k_proj.bias",
  "attention.value.kernel": "self_attn.v_proj.weight",
  "attention.value.bias": "self_attn.v_proj.bias",
  "attention.output.kernel": "self_attn.o_proj.weight",
  "attention.output.bias": "self_attn.o_proj.bias",
  "attention.query_norm.scale": "self_attn.q_norm.weight",
  "attention.key_norm.scale": "self_attn.k_norm.weight",
  "mlp_norm.scale": "post_attention_layernorm.weight",
  "mlp.gate.kernel": "mlp.gate_proj.weight",
  "mlp.gate.bias": "mlp.gate_proj.bias",
  "mlp.up.kernel": "mlp.up_proj.weight",
  "mlp.up.bias": "mlp.up_proj.bias",
  "mlp.down.kernel": "mlp.down_proj.weight",
  "mlp.down.bias": "mlp.down_proj.bias",
}

# Kernels that contract more than one dimension.
_INPUT_DIMS = {"layers.attention.output.kernel": 2}

# Buffers that old files hold beside the weights; computed here.
_BUFFERS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")

# Logical axes along which a parameter has several tensors, outermost first.
_STACKED = (transformer.STACKED, "experts")

_EMBEDDING = _NAMES["embed.embedding"]
_HEAD = _NAMES["lm_head.embedding"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
  """One tensor of a checkpoint, and the part of a parameter it is.

  A kernel `[*inputs, *outputs]` is a matrix `[outputs, inputs]` in the file;
  other parameters keep the order of their dimensions. What has several input
  or output dimensions here has their product there. An embedding has no
  padding rows in the file.

  Attributes:
    name: in the file.
    shape: in the file.
    parameter: dotted path in the nested dict.
    index: on the parameter's leading axes, of layers and experts; () if it is
      not stacked.
    sizes: of the parameter's other dimensions.
    inputs: how many of them are contracted.
  """

  name: str
  shape: tuple[int, ...]
  parameter: str
  index: tuple[int, ...]
  sizes: tuple[int, ...]
  inputs: int

  def from_file(self, source: Any, index: Index) -> np.ndarray:
    """Reads a block of the parameter from a sliceable tensor of the file."""
    bounds = [
      part.indices(size)[:2]
      for part, size in zip(index, self.sizes, strict=True)
    ]
    file_order = [*range(self.inputs, len(self.sizes)), *range(self.inputs)]
    outer, *rest = file_order
    if self._is_embedding:
      (start, stop), columns = bounds
      if start >= self.shape[0]:
        return np.zeros((stop - start, columns[1] - columns[0]), np.float32)
      rows = source[start : min(stop, self.shape[0]), slice(*columns)]
      return np.pad(rows, ((0, stop - start - len(rows)), (0, 0)))
    # The first dimension in the file is outermost in memory: read its range,
    # then cut the rest.
    width = self.shape[0] // self.sizes[outer]
    start, stop = bounds[outer]
    block = source[start * width : stop * width]
    block = block.reshape(stop - start, *(self.sizes[dim] for dim in rest))
    block = block[:, *(slice(*bounds[dim]) for dim in rest)]
    return block.transpose(np.argsort(file_order))

  def to_file(self, value: np.ndarray) -> np.ndarray:
    """The tensor as the file holds it, from the whole parameter."""
    if self._is_embedding:
      return np.ascontiguousarray(value[: self.shape[0]])
    dims = range(value.ndim)
    value = value.transpose(*dims[self.inputs :], *dims[: self.inputs])
    return np.ascontiguousarray(value).reshape(self.shape)

  @property
  def _is_embedding(self) -> bool:
    return self.parameter.endswith(".embedding")


def tensors(config: ModelConfig) -> list[Tensor]:
  """Every tensor of a checkpoint of this model, parameter after parameter."""
  leaves, _ = jax.tree.flatten_with_path(transformer.shapes(config))
  axes = jax.tree.leaves(
    transformer.axes(config), is_leaf=lambda node: isinstance(node, tuple)
  )
  names = {**_LAYER_NAMES, **FAMILIES[config.family].tensors}
  found = []
  for (path, leaf), leaf_axes in zip(leaves, axes, strict=True):
    parameter = ".".join(key.key for key in path)
    _, _, rest = parameter.partition(".")
    stacked = sum(name in _STACKED for name in leaf_axes)
    sizes = leaf.shape[stacked:]
    inputs = 0
    if parameter.endswith(".kernel"):
      inputs = _INPUT_DIMS.get(parameter, 1)
      shape = (math.prod(sizes[inputs:]), math.prod(sizes[:inputs]))
    elif parameter.endswith(".embedding"):
      shape = (config.vocab_size, config.hidden_size)
    else:
      shape = (math.prod(sizes),)

    def name(index: tuple[int, ...], parameter=parameter, rest=rest) -> str:
      if not index:
        return _NAMES[parameter]
      layer, *expert = index
      return f"model.layers.{layer}.{names[rest].format(*expert)}"

    found.extend(
      Tensor(
        name=name(index),
        shape=shape,
        parameter=parameter,
        index=index,
        sizes=sizes,
        inputs=inputs,
      )
      for index in np.ndindex(leaf.shape[:stacked])
    )
  return found


def parameter_count(config: ModelConfig) -> int:
  """Weights of a checkpoint; tied embeddings count once."""
  return sum(math.prod(tensor.shape) for tensor in tensors(config))


def resolve(path: str | AnyPath) -> AnyPath:
  """The folder of a checkpoint; nothing is downloaded.

  Args:
    path: a local folder, one in a bucket (`gs://bucket/folder`), or `org/name`
      or `org/name@revision` in the Hugging Face cache.

  Raises:
    InputError: it is in none of these places.
  """
  folder = storage.to_path(path)
  if storage.is_remote(folder):
    storage.require_folder(folder)
    return folder
  if folder.is_dir():
    return folder
  repository, _, revision = str(path).partition("@")
  if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repository):
    import huggingface_hub
    from huggingface_hub import errors

    with contextlib.suppress(
      errors.LocalEntryNotFoundError, errors.HFValidationError
    ):
      return Path(
        huggingface_hub.snapshot_download(
          repository, revision=revision or None, local_files_only=True
        )
      )
    option = f" --revision {revision}" if revision else ""
    raise InputError(
      f"model {str(path)!r} is neither a folder nor in the Hugging Face cache; "
      f"run: hf download {repository}{option}"
    )
  raise InputError(
    f"model {str(path)!r} is no folder; give a folder with config.json and "
    "safetensors files, or org/name of a downloaded Hugging Face model"
  )


def read_config(path: str | AnyPath) -> ModelConfig:
  """The model described by a checkpoint's `config.json`.

  Raises:
    InputError: no such file, not JSON, or a model that is not supported.
  """
  file = resolve(path) / CONFIG_FILE
  values = read_json(file)
  try:
    return ModelConfig.from_hf(values)
  except InputError as error:
    raise InputError(f"{file.parent}: {error}") from error


def check(path: str | AnyPath, config: ModelConfig) -> dict[str, Stored]:
  """Compares a checkpoint's files with what the model needs.

  Reads headers only.

  Returns:
    Every tensor, to be read.

  Raises:
    InputError: a file is missing or damaged; a tensor is missing, unexpected,
      or of a wrong shape or dtype.
  """
  folder = resolve(path)
  expected = {tensor.name: tensor.shape for tensor in tensors(config)}
  optional = set()
  if config.tie_embeddings:
    expected[_HEAD] = expected[_EMBEDDING]
    optional.add(_HEAD)
  where: dict[str, Stored] = {}
  for file in _files(folder):
    for name, stored in tensor_files.read_header(file).items():
      if _BUFFERS.fullmatch(name):
        continue
      if name not in expected:
        raise InputError(
          f"{file} holds {name}, which a {config.family} model with this "
          "config.json does not have; the file and config.json do not belong "
          "together"
        )
      if stored.shape != expected[name]:
        raise InputError(
          f"{name} in {file} has shape {stored.shape}, but config.json asks "
          f"for {expected[name]}; the file and config.json do not belong "
          "together"
        )
      if stored.dtype not in tensor_files.DTYPES:
        raise InputError(
          f"{name} in {file} is {stored.dtype}; supported: "
          f"{', '.join(tensor_files.DTYPES)}"
        )
      where[name] = stored
  missing = [
    name for name in expected if name not in where and name not in optional
  ]
  if missing:
    raise InputError(
      f"{folder} lacks {len(missing)} tensors that config.json asks for, such "
      f"as {missing[0]}; is the download complete?"
    )
  return where


def load(path: str | AnyPath, model: Model, dtype: str = "float32") -> Params:
  """Reads a checkpoint straight into the model's places.

  Each process reads the blocks of its own devices, a few layers at a time; see
  `placing`. What the model holds as int8 is quantized as it is read.

  Args:
    path: see `resolve`.
    model: says which weights, and where they go.
    dtype: of the other weights in memory, "float32" or "bfloat16".

  Returns:
    Weights as a nested dict, placed as `model.abstract_params` says.

  Raises:
    InputError: see `check`; also a checkpoint with tied embeddings that stores
      another output layer.
  """
  sources = check(path, model.config)
  if model.config.tie_embeddings and _HEAD in sources:
    _require_tied(sources, model.config)
  by_parameter: dict[str, list[Tensor]] = {}
  for tensor in tensors(model.config):
    by_parameter.setdefault(tensor.parameter, []).append(tensor)
  abstract = model.abstract_params(dtype)
  targets = {
    _dotted(path): leaf for path, leaf in jax.tree.leaves_with_path(abstract)
  }
  placed: dict[str, jax.Array] = {}
  for parameter, parts in by_parameter.items():
    target = targets[parameter]

    def read(number: int, index: Index, parts=parts) -> np.ndarray:
      part = parts[number]
      return part.from_file(sources[part.name], index)

    found = placing.Tensors(
      read=read,
      stacked=len(parts[0].index),
      inputs=parts[0].inputs,
      by_rows=storage.is_remote(sources[parts[0].name].path),
    )
    scale = parameter.removesuffix(quantize.KERNEL) + quantize.SCALE
    if scale in targets:
      placed[parameter], placed[scale] = placing.place_quantized(
        found, target, targets[scale]
      )
    else:
      placed[parameter] = placing.place(found, target)
  return jax.tree.map_with_path(lambda path, _: placed[_dotted(path)], abstract)


def _dotted(path: Any) -> str:
  return ".".join(key.key for key in path)


def fingerprint(path: str | AnyPath) -> str:
  """SHA-256 over the bytes of a checkpoint's weights, its files in order.

  Reads all of them.

  Raises:
    InputError: no weights there.
  """
  digest = hashlib.sha256()
  for file in _files(resolve(path)):
    with file.open("rb") as stream:
      while part := stream.read(2**24):
        digest.update(part)
  return digest.hexdigest()


def read_output_rows(
  path: str | AnyPath, config: ModelConfig, ids: Sequence[int]
) -> np.ndarray:
  """Rows of a checkpoint's output layer, one per id, as float32.

  Args:
    path: see `resolve`.
    config: of the model.
    ids: less than its `vocab_size`.

  Raises:
    InputError: see `check`.
  """
  name = _EMBEDDING if config.tie_embeddings else _HEAD
  rows = check(path, config)[name]
  return np.concatenate(
    [rows[index : index + 1].astype(np.float32) for index in ids]
  )


def _require_tied(sources: Mapping[str, Stored], config: ModelConfig) -> None:
  rows = 8192
  for start in range(0, config.vocab_size, rows):
    block = slice(start, min(start + rows, config.vocab_size))
    if not np.array_equal(sources[_HEAD][block], sources[_EMBEDDING][block]):
      raise InputError(
        f"tie_word_embeddings is true, but the checkpoint's {_HEAD} differs "
        f"from {_EMBEDDING}; set tie_word_embeddings to false in config.json, "
        f"or remove {_HEAD}"
      )


def _files(folder: AnyPath) -> list[AnyPath]:
  """The safetensors files of a checkpoint, all of them there."""
  if (folder / SINGLE_FILE).is_file():
    return [folder / SINGLE_FILE]
  if not (folder / INDEX_FILE).is_file():
    pickles = sorted(file.name for file in folder.glob("*.bin"))
    if pickles:
      raise InputError(
        f"{folder} holds pickled weights ({pickles[0]}), which are not read "
        "because a pickle can run code; save the model as safetensors with "
        "transformers: save_pretrained(folder, safe_serialization=True)"
      )
    raise InputError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}")
  index = read_json(folder / INDEX_FILE)
  if not isinstance(index.get("weight_map"), dict):
    raise InputError(f"{folder / INDEX_FILE} has no weight_map")
  files = [folder / name for name in sorted(set(index["weight_map"].values()))]
  for file in files:
    if not file.is_file():
      raise InputError(
        f"{INDEX_FILE} names {file.name}, which is not in {folder}; is the "
        "download complete?"
      )
  return files


def read_json(file: AnyPath) -> dict[str, Any]:
  """The object in a JSON file of a checkpoint.

  Raises:
    InputError: no such file, or no JSON object in it.
  """
  if not file.is_file():
    raise InputError(
      f"{file} does not exist; give the folder of a Hugging Face checkpoint"
    )
  try:
    values = json.loads(file.read_text(encoding="utf-8"))
  except ValueError as error:
    raise InputError(f"{file} is not valid JSON: {error}") from error
  if not isinstance(values, dict):
    raise InputError(f"{file} must hold a JSON object")
  return values
