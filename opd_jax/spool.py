"""Files that grow, in a workdir that may be a bucket.

An object of a bucket cannot grow. So such files are written to a local folder,
and those that changed are uploaded as a whole from time to time.
"""

import contextlib
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd_jax import storage
from opd_jax.storage import AnyPath

# What is younger may be lost with the process; checkpoints come with an upload.
_SECONDS = 60


class Spool(contextlib.AbstractContextManager):
  """A local folder that a workdir gets the files of.

  Attributes:
    folder: to write to; the workdir itself if that is local.
  """

  def __init__(self, workdir: AnyPath, resumed: Sequence[str] = ()):
    """Opens it.

    Args:
      workdir: of the run.
      resumed: names of files that are gone on with, if they are there.
    """
    self._bucket = workdir if storage.is_remote(workdir) else None
    self._known: dict[Path, tuple[int, int]] = {}
    self._last = time.monotonic()
    if self._bucket is None:
      self.folder = Path(workdir)
      return
    self.folder = Path(tempfile.mkdtemp(prefix="opd-jax-"))
    for name in resumed:
      if (self._bucket / name).exists():
        (self.folder / name).write_bytes((self._bucket / name).read_bytes())

  def upload(self, *, wait: bool = True) -> None:
    """Uploads what changed.

    Args:
      wait: false does so at most once a minute.
    """
    young = time.monotonic() < self._last + _SECONDS
    if self._bucket is None or (young and not wait):
      return
    for file in sorted(self.folder.rglob("*")):
      state = file.stat()
      stamp = (state.st_size, state.st_mtime_ns)
      if file.is_file() and self._known.get(file) != stamp:
        storage.upload(file, self._bucket / str(file.relative_to(self.folder)))
        self._known[file] = stamp
    self._last = time.monotonic()

  def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
    if self._bucket is None:
      return
    try:
      self.upload()
    except Exception as failure:
      if error is None:
        raise
      # In the place of what ended the run it would hide that.
      told = f"opd-jax: the last logs were not uploaded: {failure!r}"
      print(told, file=sys.stderr)
    finally:
      shutil.rmtree(self.folder, ignore_errors=True)
