"""Folders in a bucket: `gs://bucket/folder` in the place of a local path.

Paths in a bucket are `epath.Path`s, which are used like `pathlib.Path`s.
"""

import atexit
import functools
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from etils import epath

from opd_jax.errors import InputError

# A local path, or one in a bucket.
AnyPath = Path | epath.Path

_SCHEME = re.compile(r"[a-z][a-z0-9]*://")

# Large, and not among what is copied.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")


def is_remote(path: str | AnyPath) -> bool:
  """Whether a path is one in a bucket."""
  return _SCHEME.match(str(path)) is not None


def to_path(path: str | AnyPath) -> AnyPath:
  """A path to work with.

  Raises:
    InputError: what reads such a bucket is not installed.
  """
  if not is_remote(path):
    return Path(path).expanduser()
  file_system(path)
  return epath.Path(path)


def file_system(path: str | AnyPath) -> tuple[Any, str]:
  """What reads a bucket, an fsspec file system, and a path's name in it.

  Raises:
    InputError: it is not installed, or there is none of this kind.
  """
  import fsspec

  try:
    return fsspec.core.url_to_fs(str(path))
  except (ImportError, ValueError) as error:
    raise InputError(
      f"{path} cannot be reached: {error}; for gs:// install the extra gcs "
      '(pip install "opd-jax[gcs]"), or use a folder of this machine'
    ) from error


def require_folder(folder: AnyPath) -> None:
  """Raises `InputError` unless a folder in a bucket is there and readable."""
  try:
    found = folder.is_dir()
  except OSError as error:
    raise InputError(
      f"{folder} cannot be read: {error}; is this machine allowed to? Try: "
      f"gcloud storage ls {folder}"
    ) from error
  if not found:
    raise InputError(
      f"{folder} is no folder of a bucket; look with: gcloud storage ls "
      f"{folder}"
    )


def read_range(path: str | AnyPath, start: int, stop: int) -> bytes:
  """Bytes [start, stop) of a file in a bucket, and no others."""
  system, name = file_system(path)
  return system.cat_file(name, start=start, end=stop)


def upload(file: Path, target: str | AnyPath) -> None:
  """Copies a local file into a bucket, in place of what is there."""
  system, name = file_system(target)
  system.makedirs(name.rpartition("/")[0], exist_ok=True)
  system.put_file(str(file), name)


def remove(folder: str | AnyPath) -> None:
  """Removes a folder of a bucket, if it is there, and all in it."""
  system, name = file_system(folder)
  if system.exists(name):
    system.rm(name, recursive=True)


def size(path: str | AnyPath) -> int:
  """Bytes of a file in a bucket."""
  system, name = file_system(path)
  return system.size(name)


def local_copy(folder: AnyPath) -> Path:
  """A local folder with the files of a checkpoint but for its weights.

  Of a local folder that is itself. A folder in a bucket is copied once per
  process; the copy is gone with the process.
  """
  if not is_remote(folder):
    return Path(folder)
  return _copy(str(folder))


@functools.cache
def _copy(folder: str) -> Path:
  target = Path(tempfile.mkdtemp(prefix="opd-jax-"))
  atexit.register(shutil.rmtree, target, ignore_errors=True)
  _copy_files(epath.Path(folder), target)
  return target


def _copy_files(source: epath.Path, target: Path) -> None:
  for found in source.iterdir():
    if found.is_dir():
      (target / found.name).mkdir()
      _copy_files(found, target / found.name)
    elif found.suffix not in _WEIGHTS:
      (target / found.name).write_bytes(found.read_bytes())
