"""Fixtures of the preflight tests."""

import shutil

import pytest

from tests import pair


@pytest.fixture(scope="session")
def good(tmp_path_factory):
  """A pair that nothing is wrong with."""
  return pair.write_pair(tmp_path_factory.mktemp("good"))


@pytest.fixture
def folder(good, tmp_path):
  """A copy of it to damage."""
  return shutil.copytree(good, tmp_path / "pair")
