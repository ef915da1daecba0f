"""Safetensors files, read by ranges.

A file is 8 bytes of length, a JSON header of that length, and the tensors one
after the other, rows outermost. A local file is mapped into memory, so that a
slice of a tensor is a view and only what is copied out of it is read. Of a file
in a bucket the rows of a slice are fetched, whole.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from opd_jax import storage
from opd_jax.errors import InputError
from opd_jax.storage import AnyPath

# What a model may be stored in; other tensors can be listed, not read.
DTYPES: Mapping[str, Any] = {
  "F32": np.dtype(np.float32),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F16": np.dtype(np.float16),
}

_LENGTH_BYTES = 8
_LONGEST_HEADER = 100_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
  """One tensor of a file; `stored[rows]` and `stored[rows, columns]` read it.

  Attributes:
    path: of the file.
    dtype: as the file names it.
    shape: in the file.
    start: byte of the file where it begins.
    mapped: the bytes of a local file; None in a bucket.
  """

  path: AnyPath
  dtype: str
  shape: tuple[int, ...]
  start: int
  mapped: np.ndarray | None

  def __getitem__(self, index: slice | tuple[slice, ...]) -> np.ndarray:
    """The slice, in the dtype of the file."""
    rows, *rest = index if isinstance(index, tuple) else (index,)
    first, last, _ = rows.indices(self.shape[0])
    dtype = DTYPES[self.dtype]
    row = math.prod(self.shape[1:]) * dtype.itemsize
    bounds = self.start + first * row, self.start + max(first, last) * row
    if self.mapped is not None:
      data = self.mapped[slice(*bounds)]
    else:
      data = storage.read_range(self.path, *bounds)
    block = np.frombuffer(data, dtype).reshape(-1, *self.shape[1:])
    return block[:, *rest]


def read_header(path: AnyPath) -> dict[str, Stored]:
  """The tensors of a file by name; none of them is read.

  Raises:
    InputError: damaged, or no safetensors file.
  """
  if storage.is_remote(path):
    mapped, size = None, storage.size(path)
  else:
    mapped = np.memmap(Path(path), np.uint8, "r")
    size = len(mapped)

  def read(start: int, stop: int) -> bytes:
    if mapped is not None:
      return mapped[start:stop].tobytes()
    return storage.read_range(path, start, stop)

  try:
    if size < _LENGTH_BYTES:
      raise ValueError("it is too short")
    begin = _LENGTH_BYTES + int.from_bytes(read(0, _LENGTH_BYTES), "little")
    if begin > min(size, _LONGEST_HEADER):
      raise ValueError("the header is longer than the file")
    header = json.loads(read(_LENGTH_BYTES, begin))
    header.pop("__metadata__", None)
    entries = list(_entries(header))
    _check_gapless([bounds for *_, bounds in entries], size - begin)
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise InputError(
      f"{path} is damaged or no safetensors file ({error}); download it again"
    ) from error
  return {
    name: Stored(
      path=path,
      dtype=dtype,
      shape=shape,
      start=begin + bounds[0],
      mapped=mapped,
    )
    for name, dtype, shape, bounds in entries
  }


def _entries(
  header: Mapping[str, Any],
) -> Iterator[tuple[str, str, tuple[int, ...], tuple[int, int]]]:
  for name, entry in header.items():
    shape = tuple(map(int, entry["shape"]))
    start, stop = map(int, entry["data_offsets"])
    dtype = entry["dtype"]
    if dtype in DTYPES:
      expected = math.prod(shape) * DTYPES[dtype].itemsize
      if stop - start != expected:
        raise ValueError(f"{name} has {stop - start} bytes, not {expected}")
    yield name, dtype, shape, (start, stop)


def _check_gapless(bounds: list[tuple[int, int]], size: int) -> None:
  """Raises unless the tensors fill the bytes behind the header."""
  end = 0
  for start, stop in sorted(bounds):
    if start != end or stop < start:
      raise ValueError(f"a tensor begins at byte {start}, not {end}")
    end = stop
  if end != size:
    raise ValueError(f"{size} bytes of tensors, not {end}")
