"""Checkpoints in a bucket, on a file system that stands in for it."""

import importlib
import json

import jax
import numpy as np
import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.numpy import save_file

from opd_jax import storage, tokenizer
from opd_jax.errors import InputError
from opd_jax.export import export
from opd_jax.models import hf
from tests import pair
from tests.models import tiny

# `fsspec.registry` is the module's mapping, not the module.
REGISTRY = importlib.import_module("fsspec.registry")


class Bucket(MemoryFileSystem):
  """`gs://` in memory; counts what is fetched of files."""

  protocol = ("gs", "gcs")
  fetched = 0

  def __init__(self, *args, finalize_on_close=False, **kwargs):
    del finalize_on_close  # gcsfs has it.
    super().__init__(*args, **kwargs)

  @classmethod
  def _strip_protocol(cls, path):
    return super()._strip_protocol(str(path).removeprefix("gs:/"))

  def cat_file(self, path, start=None, end=None, **kwargs):
    found = super().cat_file(path, start=start, end=end, **kwargs)
    type(self).fetched += len(found)
    return found


@pytest.fixture
def bucket(monkeypatch):
  for name in Bucket.protocol:
    monkeypatch.setitem(REGISTRY._registry, name, Bucket)
  monkeypatch.setattr(Bucket, "store", {})
  monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
  monkeypatch.setattr(Bucket, "fetched", 0)
  backend.fsspec_backend._get_filesystem.cache_clear()
  storage._copy.cache_clear()
  yield Bucket()
  backend.fsspec_backend._get_filesystem.cache_clear()
  storage._copy.cache_clear()


@pytest.fixture
def folder(tmp_path):
  """A folder of a llama with a tokenizer."""
  folder = tmp_path / "model"
  folder.mkdir()
  config = tiny.CONFIGS["llama"]
  (folder / "config.json").write_text(json.dumps(config.to_hf()))
  random = np.random.default_rng(0)
  save_file(
    {
      tensor.name: random.standard_normal(tensor.shape, np.float32)
      for tensor in hf.tensors(config)
    },
    folder / "model.safetensors",
  )
  pair.write_tokenizer(folder)
  return folder


def _upload(bucket, folder, url):
  for file in folder.iterdir():
    bucket.pipe_file(f"{url}/{file.name}", file.read_bytes())


def test_a_checkpoint_in_a_bucket_is_that_of_a_folder(bucket, folder, tmp_path):
  url = "gs://models/of/tiny"
  _upload(bucket, folder, url)
  model = tiny.model("llama")
  assert str(hf.resolve(url)) == url
  assert hf.read_config(url) == model.config
  want = hf.load(folder, model)
  jax.tree.map(np.testing.assert_array_equal, hf.load(url, model), want)
  assert hf.fingerprint(url) == hf.fingerprint(folder)
  np.testing.assert_array_equal(
    hf.read_output_rows(url, model.config, [3, 100]),
    hf.read_output_rows(folder, model.config, [3, 100]),
  )
  there, here = tokenizer.load(hf.resolve(url)), tokenizer.load(folder)
  assert there.fingerprint() == here.fingerprint()
  assert there.stop_ids == here.stop_ids
  assert str(there.path) == url
  export(want, model, url, tmp_path / "out")
  assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
    folder / "tokenizer.json"
  ).read_bytes()


def test_only_the_rows_in_question_are_fetched(bucket, folder):
  """Of a kernel whose outputs are cut, half; of one whose inputs are, all."""
  _upload(bucket, folder, "gs://models/tiny")
  stored = hf.check("gs://models/tiny", tiny.CONFIGS["llama"])
  headers = bucket.fetched
  assert headers < 8 + 2**12
  rows = stored["model.layers.1.mlp.up_proj.weight"]
  assert rows.shape == (28, 20)
  part = rows[14:21, 5:10]
  assert bucket.fetched == headers + 7 * 20 * 4
  local = hf.check(folder, tiny.CONFIGS["llama"])
  np.testing.assert_array_equal(
    part, local["model.layers.1.mlp.up_proj.weight"][14:21, 5:10]
  )


def test_weights_are_not_among_what_is_copied(bucket, folder):
  _upload(bucket, folder, "gs://models/tiny")
  bucket.pipe_file("gs://models/tiny/templates/a.jinja", b"{{ x }}")
  copy = storage.local_copy(storage.to_path("gs://models/tiny"))
  names = {file.name for file in copy.iterdir()}
  weights = {"model.safetensors"}
  assert names == {file.name for file in folder.iterdir()} - weights | {
    "templates"
  }
  assert (copy / "templates" / "a.jinja").read_text() == "{{ x }}"
  assert storage.local_copy(storage.to_path("gs://models/tiny")) == copy
  assert storage.local_copy(folder) == folder


def test_what_is_not_there_is_named(bucket, folder):
  with pytest.raises(InputError, match="gcloud storage ls gs://models/none"):
    hf.resolve("gs://models/none")
  _upload(bucket, folder, "gs://models/tiny")
  bucket.rm("gs://models/tiny/config.json")
  with pytest.raises(InputError, match=r"tiny/config.json does not exist"):
    hf.read_config("gs://models/tiny")
  bucket.rm("gs://models/tiny/model.safetensors")
  with pytest.raises(InputError, match=r"neither model\.safetensors nor"):
    hf.check("gs://models/tiny", tiny.CONFIGS["llama"])


def test_a_damaged_file_in_a_bucket_is_named(bucket, folder):
  data = (folder / "model.safetensors").read_bytes()
  _upload(bucket, folder, "gs://models/tiny")
  for damaged in (data[:-4], data[:100], b"", b"\xff" * 64):
    bucket.pipe_file("gs://models/tiny/model.safetensors", damaged)
    with pytest.raises(InputError, match=r"gs://models/tiny/.* is damaged"):
      hf.check("gs://models/tiny", tiny.CONFIGS["llama"])


def test_without_the_extra_it_says_what_to_install(monkeypatch):
  monkeypatch.setitem(REGISTRY._registry, "gs", None)
  monkeypatch.delitem(REGISTRY._registry, "gs")
  monkeypatch.setitem(
    REGISTRY.known_implementations,
    "gs",
    {"class": "no_such_module.Bucket", "err": "Please install gcsfs"},
  )
  with pytest.raises(InputError, match=r'gcsfs.*pip install "opd-jax\[gcs\]"'):
    hf.read_config("gs://models/tiny")


def test_a_bucket_that_may_not_be_read_is_named(bucket, monkeypatch):
  def forbidden(self, path):
    raise PermissionError("Forbidden")

  monkeypatch.setattr(Bucket, "isdir", forbidden)
  with pytest.raises(InputError, match=r"Forbidden; is this machine allowed"):
    hf.resolve("gs://models/tiny")
