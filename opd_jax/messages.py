"""Values of the host as bytes, and back.

Nothing of a message is run: a value is made of numbers, texts, arrays, lists,
tuples, dictionaries and this package's dataclasses.
"""

import dataclasses
import importlib
import io
import json
from typing import Any

import numpy as np

# What JSON has one kind of.
_COLLECTIONS = {"list": list, "tuple": tuple}


def pack(value: Any) -> bytes:
  """A value as bytes.

  Args:
    value: None, a bool, number or text; an array of numbers; or a list, tuple,
      dictionary or dataclass of these. Dataclasses are those of opd_jax.

  Raises:
    TypeError: it is, or has in it, anything else.
  """
  arrays: list[np.ndarray] = []
  text = json.dumps(_written(value, arrays)).encode()
  file = io.BytesIO()
  np.savez(file, np.frombuffer(text, np.uint8), *arrays)
  return file.getvalue()


def unpack(data: bytes) -> Any:
  """The value of `pack`."""
  with np.load(io.BytesIO(data), allow_pickle=False) as file:
    text, *arrays = (file[name] for name in file.files)
  return _read(json.loads(text.tobytes()), arrays)


def _written(value: Any, arrays: list[np.ndarray]) -> Any:
  if isinstance(value, np.generic):
    value = value.item()
  if value is None or isinstance(value, bool | int | float | str):
    return value
  if isinstance(value, np.ndarray):
    if value.dtype.kind not in "biuf":
      raise TypeError(f"an array of {value.dtype} is not sent")
    arrays.append(value)
    return {"array": len(arrays) - 1}
  for kind, collection in _COLLECTIONS.items():
    if type(value) is collection:
      return {kind: [_written(each, arrays) for each in value]}
  if isinstance(value, dict):
    return {
      "dict": [
        [_written(key, arrays), _written(each, arrays)]
        for key, each in value.items()
      ]
    }
  kind = type(value)
  if not dataclasses.is_dataclass(value) or not _is_ours(kind.__module__):
    raise TypeError(f"a {kind.__module__}.{kind.__qualname__} is not sent")
  fields = {
    field.name: _written(getattr(value, field.name), arrays)
    for field in dataclasses.fields(value)
    if field.init
  }
  return {"dataclass": [kind.__module__, kind.__qualname__], "fields": fields}


def _read(written: Any, arrays: list[np.ndarray]) -> Any:
  if not isinstance(written, dict):
    return written
  if "array" in written:
    return arrays[written["array"]]
  for kind, collection in _COLLECTIONS.items():
    if kind in written:
      return collection(_read(each, arrays) for each in written[kind])
  if "dict" in written:
    return {
      _read(key, arrays): _read(each, arrays) for key, each in written["dict"]
    }
  module, name = written["dataclass"]
  kind = _is_ours(module) and getattr(importlib.import_module(module), name)
  if not isinstance(kind, type) or not dataclasses.is_dataclass(kind):
    raise TypeError(f"{module}.{name} is no dataclass of opd_jax")
  fields = written["fields"]
  return kind(**{name: _read(each, arrays) for name, each in fields.items()})


def _is_ours(module: str) -> bool:
  return module.partition(".")[0] == __package__
