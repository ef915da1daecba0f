"""Checkpoints in a bucket, on a file system that stands in for it."""

import dataclasses
import importlib
import json
import sys
import types

import jax
import numpy as np
import pyarrow
import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow import parquet
from safetensors.numpy import save_file

from opd_jax import saved, setup, spool, storage, tokenizer
from opd_jax.config import RunConfig
from opd_jax.data import files
from opd_jax.errors import InputError
from opd_jax.export import export, export_adapter
from opd_jax.metrics import LOGS, Writer
from opd_jax.models import Model, hf, peft
from opd_jax.parsing import parse
from opd_jax.sharding import TRAIN_RULES, Layout, make_mesh
from opd_jax.train import train
from tests import gcs, pair
from tests.lora_test import lora_of, spread
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_in_a_bucket_is_that_of_a_folder(
  bucket, folder, tmp_path, dtype
):
  """Its base is in the bucket as well."""
  base = "gs://models/tiny"
  _upload(bucket, folder, base)
  config = tiny.CONFIGS["llama"]
  model = Model(config, tiny.layout(), lora=lora_of(config))
  trained = spread(model.abstract_trained(), 0, 1.0)
  for out in ("gs://models/adapter", tmp_path / "adapter"):
    export_adapter(trained, model, base, out, dtype)
  there, here = (
    saved.find(path) for path in ("gs://models/adapter", tmp_path / "adapter")
  )
  assert str(there.adapter) == "gs://models/adapter"
  assert there.source == here.source == base
  read = peft.load(there.adapter, model)
  jax.tree.map(
    np.testing.assert_array_equal,
    read,
    jax.tree.map(lambda leaf: leaf.astype(dtype).astype("float32"), trained),
  )
  jax.tree.map(
    np.testing.assert_array_equal, peft.load(here.adapter, model), read
  )


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


@pytest.mark.parametrize(
  "sizes", [{"fsdp": 4, "tensor": 2}, {"replica": 2, "fsdp": 2}]
)
def test_every_byte_is_fetched_once(bucket, tmp_path, sizes):
  """However the kernels are cut, and by however many devices."""
  config = dataclasses.replace(
    tiny.CONFIGS["llama_biases"],
    hidden_size=16,
    intermediate_size=32,
    num_heads=8,
    num_kv_heads=8,
  )
  folder = tmp_path / "model"
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(config.to_hf()))
  random = np.random.default_rng(0)
  weights = {
    tensor.name: random.standard_normal(tensor.shape, np.float32)
    for tensor in hf.tensors(config)
  }
  save_file(weights, folder / "model.safetensors")
  _upload(bucket, folder, "gs://models/tiny")
  hf.check("gs://models/tiny", config)
  headers = bucket.fetched
  model = Model(config, tiny.layout(sizes))
  got = hf.load("gs://models/tiny", model)
  total = sum(leaf.nbytes for leaf in weights.values())
  assert bucket.fetched == 2 * headers + total
  want = hf.load(folder, model)
  for leaf, like in zip(
    jax.tree.leaves(got), jax.tree.leaves(want), strict=True
  ):
    np.testing.assert_array_equal(leaf, like)
    assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)


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


def test_rows_of_a_bucket_are_those_of_a_folder(bucket, tmp_path):
  rows = [{"text": "a", "n": 1}, {"text": "b", "n": 2}, {"text": "c", "n": 3}]
  (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
  parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "r.parquet")
  for name, read in (
    ("rows.jsonl", files.read_jsonl),
    ("r.parquet", files.read_parquet),
  ):
    bucket.pipe_file(f"gs://data/{name}", (tmp_path / name).read_bytes())
    assert read(f"gs://data/{name}") == read(tmp_path / name) == rows
    with pytest.raises(InputError, match="no data file gs://data/no/"):
      read(f"gs://data/no/{name}")


def test_an_export_to_a_bucket_is_that_to_a_folder(bucket, folder):
  model = tiny.model("llama")
  params = hf.load(folder, model)
  bucket.pipe_file("gs://runs/export/model-1.safetensors", b"of an older run")
  with pytest.raises(InputError, match="is not an empty folder"):
    export(params, model, folder, "gs://runs/export")
  export(
    *(params, model, folder, "gs://runs/export"),
    max_shard_bytes=20_000,
    replace=True,
  )
  names = [name.rpartition("/")[2] for name in bucket.find("gs://runs/export")]
  assert "model-1.safetensors" not in names
  assert sum(name.endswith(".safetensors") for name in names) > 1
  assert "tokenizer.json" in names
  jax.tree.map(
    np.testing.assert_array_equal, hf.load("gs://runs/export", model), params
  )


def test_logs_of_a_run_grow_in_a_bucket(bucket):
  root = storage.to_path("gs://runs/one")
  with spool.Spool(root, LOGS) as first:
    writer = Writer(first.folder)
    for step in (1, 2):
      writer.metrics(step, {"train/loss": 1.0})
    first.upload(wait=False)  # Too early.
    assert not (root / "metrics.jsonl").exists()
    first.upload()
    assert len((root / "metrics.jsonl").read_text().splitlines()) == 2
    writer.metrics(3, {"train/loss": 1.0})
    writer.close()
  assert not first.folder.exists()
  lines = (root / "metrics.jsonl").read_text()
  assert [json.loads(line)["step"] for line in lines.splitlines()] == [1, 2, 3]
  assert any("tfevents" in name for name in bucket.find("gs://runs/one"))
  # Resumed after step 2, on another machine.
  with spool.Spool(root, LOGS) as second:
    writer = Writer(second.folder, 2)
    writer.metrics(3, {"train/loss": 2.0})
    writer.close()
  lines = (root / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["train/loss"] for line in lines] == [1, 1, 2]


@pytest.mark.parametrize("error", [None, FloatingPointError("loss is nan")])
def test_an_upload_that_fails_hides_no_error(
  bucket, monkeypatch, capsys, error
):
  logs = spool.Spool(storage.to_path("gs://runs/one"))

  def fail(*args):
    raise OSError("no network")

  def end():
    with logs:
      (logs.folder / "file").write_text("x")
      if error is not None:
        raise error

  monkeypatch.setattr(storage, "upload", fail)
  with pytest.raises(type(error or OSError())):
    end()
  assert ("no network" in capsys.readouterr().err) is (error is not None)
  assert not logs.folder.exists()


def test_a_local_workdir_needs_no_spool(tmp_path):
  with spool.Spool(tmp_path, LOGS) as local:
    (local.folder / "file").write_text("x")
  assert local.folder == tmp_path
  assert (tmp_path / "file").exists()


@pytest.fixture
def server(bucket, monkeypatch):
  """The bucket over HTTP, for tensorstore; orbax asks what kind it is."""
  server = gcs.serve(bucket)
  address = f"http://localhost:{server.server_port}"
  monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
  monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
  flat = types.SimpleNamespace(hierarchical_namespace_enabled=False)
  client = types.SimpleNamespace(get_bucket=lambda name: flat)
  google = types.ModuleType("google.cloud.storage")
  google.Client = lambda: client
  monkeypatch.setitem(sys.modules, google.__name__, google)
  monkeypatch.setattr(
    importlib.import_module("google.cloud"), "storage", google, raising=False
  )
  yield
  server.shutdown()
  server.server_close()


def test_a_run_in_a_bucket_is_that_in_a_folder(
  bucket, server, monkeypatch, tmp_path
):
  """It is cut after step 3 and resumed; logs, weights and figures agree."""
  monkeypatch.setattr(
    setup, "make_mesh", lambda sizes: make_mesh({}, jax.devices()[:1])
  )
  folder = pair.write_pair(tmp_path)
  texts = (folder / "texts.jsonl").read_bytes()
  bucket.pipe_file("gs://data/texts.jsonl", texts)
  values = pair.config_of(folder, steps=5)
  values["data"]["sources"]["texts"]["path"] = "gs://data/texts.jsonl"
  root = storage.to_path("gs://runs/one")
  train(parse(RunConfig, {**values, "steps": 3}), str(root))
  found = train(parse(RunConfig, values), str(root))
  local = train(parse(RunConfig, values), tmp_path / "run")
  assert found.step == local.step == 5
  assert found.after == local.after
  samples = (root / "samples.jsonl").read_text()
  assert samples == (tmp_path / "run" / "samples.jsonl").read_text()
  assert json.loads((root / "summary.json").read_text())["step"] == 5
  saved_run = saved.find_run("gs://runs/one")
  assert saved_run.step == 5
  model = Model(
    saved_run.architecture,
    Layout.create(make_mesh({}, jax.devices()[:1]), TRAIN_RULES),
  )
  jax.tree.map(
    np.testing.assert_array_equal,
    hf.load("gs://runs/one/export", model),
    hf.load(tmp_path / "run" / "export", model),
  )
