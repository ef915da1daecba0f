"""Writes a model as a Hugging Face checkpoint, or its adapters for PEFT."""

import functools
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from opd_jax import storage
from opd_jax.errors import InputError
from opd_jax.models import hf, lora, peft
from opd_jax.models.api import Model
from opd_jax.models.config import ModelConfig
from opd_jax.storage import AnyPath
from opd_jax.types import Params

DTYPES = ("float32", "bfloat16")

# What a checkpoint holds beside config.json and the weights.
_CARRIED = (
  "added_tokens.json",
  "chat_template.*",
  "additional_chat_templates",
  "generation_config.json",
  "merges.txt",
  "special_tokens_map.json",
  "tokenizer.json",
  "tokenizer.model",
  "tokenizer_config.json",
  "vocab.json",
  "vocab.txt",
)


def export(
  params: Params,
  model: Model,
  source_dir: str | Path | None,
  out_dir: str | AnyPath,
  dtype: str = "float32",
  max_shard_bytes: int = 4 * 2**30,
  replace: bool = False,
) -> None:
  """Writes a folder that `transformers` and `hf.load` read.

  The vocabulary has its original rows, without padding. The folder appears
  under its name only when it is complete. With several processes all must
  call; the first one writes.

  Args:
    params: weights of `model`, wherever they are. Adapters are merged, one
      tensor at a time.
    model: its layout is where single tensors are gathered.
    source_dir: the checkpoint the model came from (see `hf.resolve`): its
      config.json is kept but for the dtype, its tokenizer, chat template and
      generation config byte for byte. None writes weights and config alone.
    out_dir: must not exist, or be empty, unless it is to be replaced.
    dtype: of the written weights, "float32" or "bfloat16".
    max_shard_bytes: larger weights are written as several files with an index.
    replace: what is in `out_dir` gives way once the new folder is complete.

  Raises:
    InputError: an unknown dtype, an `out_dir` in use, or a source of another
      architecture.
  """
  _check_dtype(dtype)
  out_dir = storage.to_path(out_dir) if replace else check_free(out_dir)
  source = None
  if source_dir is not None:
    source = storage.local_copy(hf.resolve(source_dir))
  texts = {hf.CONFIG_FILE: _config_json(model.config, source, dtype)}
  shards = _plan(model.config, np.dtype(dtype).itemsize, max_shard_bytes)
  if len(shards) > 1:
    texts[hf.INDEX_FILE] = _index(shards, dtype)
  fetch = _fetcher(params, model, dtype)
  _write(out_dir, shards, fetch, texts, source, replace)


def export_adapter(
  params: Params,
  model: Model,
  source_dir: str | Path,
  out_dir: str | AnyPath,
  dtype: str = "float32",
) -> None:
  """Writes a folder that `peft.PeftModel.from_pretrained` reads.

  Otherwise as `export`.

  Args:
    params: adapters of `model`, wherever they are.
    model: with adapters; its layout is where single tensors are gathered.
    source_dir: the checkpoint that they belong to, which is named there.
    out_dir: must not exist, or be empty.
    dtype: of the written adapters, "float32" or "bfloat16".

  Raises:
    InputError: an unknown dtype, an `out_dir` in use, or no adapters.
  """
  _check_dtype(dtype)
  if model.lora is None:
    raise InputError(
      "all weights of this run were trained, so there is no adapter to write; "
      "take --format=merged, or set student.lora in a run's config"
    )
  _write(
    check_free(out_dir),
    {peft.WEIGHTS_FILE: list(peft.tensors(model.config, model.lora))},
    _fetcher(params, model, dtype),
    {peft.CONFIG_FILE: peft.to_config(model.lora, source_dir)},
  )


def _check_dtype(dtype: str) -> None:
  if dtype not in DTYPES:
    raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")


def _write(
  out_dir: AnyPath,
  shards: Mapping[str, list[hf.Tensor]],
  fetch: Callable[[hf.Tensor], np.ndarray],
  texts: Mapping[str, Mapping[str, Any]],
  source: Path | None = None,
  replace: bool = False,
) -> None:
  """Writes a folder, which appears under its name when it is complete.

  In a bucket its config.json comes last.

  Args:
    out_dir: of the folder.
    shards: tensors by file.
    fetch: brings one of them to the host; all processes call it.
    texts: values of JSON files, by file.
    source: checkpoint whose tokenizer goes along, if any.
    replace: what is in `out_dir` gives way.
  """
  if jax.process_index() != 0:
    for tensors in shards.values():
      for tensor in tensors:
        fetch(tensor)
    return
  if storage.is_remote(out_dir):
    _upload(out_dir, shards, fetch, texts, source)
    return
  out_dir = Path(out_dir)
  partial = out_dir.with_name(f".{out_dir.name}.partial")
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  for file, tensors in shards.items():
    _save(tensors, fetch, partial / file)
  for file, values in texts.items():
    _write_json(partial / file, values)
  if source is not None:
    _carry(source, partial)
  if replace:
    shutil.rmtree(out_dir, ignore_errors=True)
  partial.replace(out_dir)


def _upload(
  out_dir: AnyPath,
  shards: Mapping[str, list[hf.Tensor]],
  fetch: Callable[[hf.Tensor], np.ndarray],
  texts: Mapping[str, Mapping[str, Any]],
  source: Path | None,
) -> None:
  """As `_write`, with one file of weights at a time on this machine's disk."""
  storage.remove(out_dir)
  with tempfile.TemporaryDirectory() as folder:
    local = Path(folder)
    for file, tensors in shards.items():
      _save(tensors, fetch, local / file)
      storage.upload(local / file, out_dir / file)
      (local / file).unlink()
    if source is not None:
      _carry(source, local)
    for file, values in texts.items():
      _write_json(local / file, values)
    found = [file for file in local.rglob("*") if file.is_file()]
    for file in sorted(found, key=lambda file: file.name == hf.CONFIG_FILE):
      storage.upload(file, out_dir / str(file.relative_to(local)))


def _save(
  tensors: list[hf.Tensor],
  fetch: Callable[[hf.Tensor], np.ndarray],
  file: Path,
) -> None:
  save_file(
    {tensor.name: fetch(tensor) for tensor in tensors},
    file,
    metadata={"format": "pt"},
  )


def check_free(out_dir: str | AnyPath) -> AnyPath:
  """The folder to write a checkpoint to.

  Raises:
    InputError: there is something already.
  """
  out_dir = storage.to_path(out_dir)
  if out_dir.exists() and not (out_dir.is_dir() and not any(out_dir.iterdir())):
    raise InputError(
      f"{out_dir} exists and is not an empty folder; name another one"
    )
  return out_dir


def _config_json(
  config: ModelConfig, source: Path | None, dtype: str
) -> dict[str, Any]:
  if source is None:
    return {**config.to_hf(), "torch_dtype": dtype}
  values = hf.read_json(source / hf.CONFIG_FILE)
  if ModelConfig.from_hf(values) != config:
    raise InputError(
      f"{source / hf.CONFIG_FILE} describes another model than the one to "
      "export; give the folder the weights were loaded from"
    )
  key = "dtype" if "dtype" in values else "torch_dtype"
  return {**values, key: dtype}


def _plan(
  config: ModelConfig, itemsize: int, max_shard_bytes: int
) -> Mapping[str, list[hf.Tensor]]:
  """Tensors of each file, in order, none over the limit if it can be helped."""
  groups: list[list[hf.Tensor]] = [[]]
  filled = 0
  for tensor in hf.tensors(config):
    size = itemsize * math.prod(tensor.shape)
    if groups[-1] and filled + size > max_shard_bytes:
      groups.append([])
      filled = 0
    groups[-1].append(tensor)
    filled += size
  if len(groups) == 1:
    return {hf.SINGLE_FILE: groups[0]}
  return {
    f"model-{number:05}-of-{len(groups):05}.safetensors": group
    for number, group in enumerate(groups, start=1)
  }


def _index(shards: Mapping[str, list[hf.Tensor]], dtype: str) -> dict[str, Any]:
  itemsize = np.dtype(dtype).itemsize
  total = sum(
    itemsize * math.prod(tensor.shape)
    for tensors in shards.values()
    for tensor in tensors
  )
  return {
    "metadata": {"total_size": total},
    "weight_map": {
      tensor.name: file
      for file, tensors in shards.items()
      for tensor in tensors
    },
  }


def _fetcher(
  params: Params, model: Model, dtype: str
) -> Callable[[hf.Tensor], np.ndarray]:
  """Brings one tensor to the host, whatever devices hold it."""
  place = functools.partial(jax.jit, out_shardings=model.layout.replicated())
  whole = place(lambda leaf: leaf.astype(dtype))

  def cut(leaf: jax.Array, index: tuple[int, ...]) -> jax.Array:
    # The layer first: layers are not spread, but experts may be.
    for number in index:
      leaf = jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False)
    return leaf

  @place
  def one_of(leaf: jax.Array, index: tuple[int, ...]) -> jax.Array:
    return cut(leaf, index).astype(dtype)

  @place
  def merged(product: Params, index: tuple[int, ...]) -> jax.Array:
    one = jax.tree.map(lambda leaf: cut(leaf, index), product)
    return lora.merged_kernel(one, adapters).astype(dtype)

  adapters: Any = model.lora

  def fetch(tensor: hf.Tensor) -> np.ndarray:
    *place, last = tensor.parameter.split(".")
    node: Any = params
    for name in place:
      node = node[name]
    if last == "kernel" and "adapter" in node:
      value = merged(node, tensor.index)
    elif tensor.index:
      value = one_of(node[last], tensor.index)
    else:
      value = whole(node[last])
    return tensor.to_file(np.asarray(value))

  return fetch


def _carry(source: Path, target: Path) -> None:
  for pattern in _CARRIED:
    for found in source.glob(pattern):
      if found.is_dir():
        shutil.copytree(found, target / found.name)
      else:
        shutil.copyfile(found, target / found.name)


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
  file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
