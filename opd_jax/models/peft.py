"""Adapters as files of PEFT: `adapter_config.json` and one safetensors file."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from opd_jax import storage
from opd_jax.config import LoraConfig
from opd_jax.errors import InputError
from opd_jax.models import hf, tensor_files
from opd_jax.models.api import Model
from opd_jax.models.config import ModelConfig
from opd_jax.models.lora import Lora
from opd_jax.storage import AnyPath
from opd_jax.types import Params

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# Fields of the config that would change what an adapter computes, and the
# values that leave it as it is here; the first is told. Some ways to start an
# adapter change the base as well.
_SUPPORTED: Mapping[str, tuple[Any, ...]] = {
  "peft_type": ("LORA",),
  "bias": ("none",),
  "fan_in_fan_out": (False,),
  "use_rslora": (False,),
  "use_dora": (False,),
  "use_qalora": (False,),
  "lora_bias": (False,),
  "modules_to_save": (None, []),
  "trainable_token_indices": (None, []),
  "target_parameters": (None, []),
  "exclude_modules": (None, []),
  "layers_to_transform": (None, []),
  "layer_replication": (None, []),
  "rank_pattern": ({}, None),
  "alpha_pattern": ({}, None),
  "alora_invocation_tokens": (None,),
  "arrow_config": (None,),
  "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
  "kasa_config": (None,),
  "megatron_config": (None,),
  "monteclora_config": (None,),
  "task_type": ("CAUSAL_LM", None),
  "use_bdlora": (None, False),
}
# Fields that are read, or do not change what a trained adapter computes.
_OTHERS = frozenset(
  """
  auto_mapping base_model_name_or_path corda_config ensure_weight_tying
  eva_config inference_mode layers_pattern loftq_config lora_alpha lora_dropout
  lora_ga_config megatron_core peft_version qalora_group_size r revision
  runtime_config target_modules velora_config
  """.split()
)


def tensors(config: ModelConfig, lora: Lora) -> Iterator[hf.Tensor]:
  """Every tensor of the file: of each product A, [r, inputs], and B."""
  for kernel in hf.tensors(config):
    if kernel.parameter not in lora.kernels:
      continue
    outputs, inputs = kernel.shape
    name = f"base_model.model.{kernel.name.removesuffix('.weight')}"
    product = kernel.parameter.removesuffix(".kernel")
    yield hf.Tensor(
      name=f"{name}.lora_A.weight",
      shape=(lora.rank, inputs),
      parameter=f"{product}.adapter.a",
      index=kernel.index,
      sizes=(*kernel.sizes[: kernel.inputs], lora.rank),
      inputs=kernel.inputs,
    )
    yield hf.Tensor(
      name=f"{name}.lora_B.weight",
      shape=(outputs, lora.rank),
      parameter=f"{product}.adapter.b",
      index=kernel.index,
      sizes=(lora.rank, *kernel.sizes[kernel.inputs :]),
      inputs=1,
    )


def to_config(lora: Lora, base: str | Path) -> dict[str, Any]:
  """The config of adapters.

  Args:
    lora: which adapters they are.
    base: checkpoint that they belong to; a folder, or a name of the Hub.
  """
  name, revision = str(base), None
  if Path(base).is_dir():
    name = str(Path(base).resolve())
  elif "@" in name:
    name, _, revision = name.partition("@")
  return {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": name,
    "revision": revision,
    "r": lora.rank,
    "lora_alpha": lora.alpha,
    "target_modules": list(lora.targets),
    "lora_dropout": 0.0,
    "bias": "none",
    "inference_mode": True,
  }


def is_adapter(path: str | AnyPath) -> bool:
  """Whether a folder, local or in a bucket, holds adapters."""
  return (storage.to_path(path) / CONFIG_FILE).is_file()


def read_base(folder: str | AnyPath) -> str:
  """The checkpoint that adapters belong to; see `hf.resolve`.

  Raises:
    InputError: the config does not say.
  """
  folder = storage.to_path(folder)
  values = hf.read_json(folder / CONFIG_FILE)
  name, revision = values.get("base_model_name_or_path"), values.get("revision")
  if not isinstance(name, str) or not name:
    raise InputError(
      f"{folder / CONFIG_FILE} has no base_model_name_or_path; write there the "
      "checkpoint that the adapter was trained on"
    )
  return f"{name}@{revision}" if revision else name


def read_lora(folder: str | AnyPath, config: ModelConfig) -> Lora:
  """Which adapters a folder holds.

  Args:
    folder: of PEFT.
    config: of the model that they belong to.

  Raises:
    InputError: another kind of adapter, or other products.
  """
  file = storage.to_path(folder) / CONFIG_FILE
  values = hf.read_json(file)
  for name, found in values.items():
    # A field that is not known may change what is computed.
    supported = _SUPPORTED.get(name, (None,))
    if name not in _OTHERS and found not in supported:
      raise InputError(
        f"{file}: {name} = {found!r} is not supported, only {supported[0]!r}; "
        "merge the adapter into its base with peft, and name the merged model"
      )
  if "peft_type" not in values:
    raise InputError(f"{file} has no peft_type; is it a config of PEFT?")
  rank: Any = values.get("r")
  alpha: Any = values.get("lora_alpha")
  targets = values.get("target_modules")
  if isinstance(targets, str):
    targets = [targets]
  if (
    type(rank) is not int
    or type(alpha) not in (int, float)
    or not isinstance(targets, list)
  ):
    raise InputError(
      f"{file} must have a number r, a number lora_alpha and a list "
      f"target_modules, got {rank!r}, {alpha!r} and {targets!r}"
    )
  try:
    wanted = LoraConfig(
      rank=rank, alpha=float(alpha), targets=tuple(sorted(targets))
    )
    return Lora.of(wanted, config)
  except InputError as error:
    raise InputError(f"{file}: {error}") from error


def load(folder: str | AnyPath, model: Model) -> Params:
  """Reads adapters into their places, float32.

  Args:
    folder: of PEFT.
    model: with `read_lora` of the folder as its `lora`.

  Raises:
    InputError: the file is damaged, or holds other tensors.
  """
  file = storage.to_path(folder) / WEIGHTS_FILE
  if not file.is_file():
    raise InputError(
      f"{file} does not exist; pickled adapters (adapter_model.bin) are not "
      "read, save them with peft as safetensors"
    )
  found = tensor_files.read_header(file)
  if model.lora is None:
    raise ValueError("the model has no adapters")
  expected = list(tensors(model.config, model.lora))
  shapes = {tensor.name: tensor.shape for tensor in expected}
  for name in sorted(shapes.keys() | found.keys()):
    there = found[name].shape if name in found else None
    if there != shapes.get(name):
      raise InputError(
        f"{name} in {file} has shape {there}, but {CONFIG_FILE} and the base "
        f"model ask for {shapes.get(name)}; the files do not belong together"
      )
    if found[name].dtype not in tensor_files.DTYPES:
      raise InputError(
        f"{name} in {file} is {found[name].dtype}, must be one of "
        f"{', '.join(tensor_files.DTYPES)}; save the adapter as one of these"
      )
  layers: dict[str, list[np.ndarray]] = {}
  for tensor in expected:
    whole = tuple(slice(None) for _ in tensor.sizes)
    value = tensor.from_file(found[tensor.name], whole).astype(np.float32)
    layers.setdefault(tensor.parameter, []).append(value)

  def place(path: Any, abstract: jax.ShapeDtypeStruct) -> jax.Array:
    value = np.stack(layers[".".join(key.key for key in path)])
    return jax.make_array_from_callback(
      abstract.shape, abstract.sharding, lambda index: value[index]
    )

  return jax.tree.map_with_path(place, model.abstract_trained())
