"""Imports of packages that would bring torch along without a use for it."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def without_torch(package: str) -> Iterator[None]:
  """Hides torch from a package that is imported inside.

  transformers and tensorboardX import torch wherever it is installed, for parts
  of them that are not used here. That takes seconds, and memory, and they have
  no switch for it. Where the package or torch is imported already, nothing is
  hidden.

  A program that wants the models of transformers beside opd_jax must therefore
  import torch first.
  """
  modules: dict[str, Any] = sys.modules
  if "torch" in modules or package in modules:
    yield
    return
  # None makes Python say that there is no such module.
  modules["torch"] = None
  try:
    yield
  finally:
    del modules["torch"]
