"""Weights into their places: how much is read, and how much is held."""

import dataclasses
import json
import tracemalloc

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from safetensors.numpy import save_file

from opd_jax.models import Model, hf, placing
from tests.models import tiny

# 24 layers, of which a kernel of the MLP has 48 MiB and one layer of it 2 MiB.
DEEP = dataclasses.replace(
  tiny.CONFIGS["llama"],
  hidden_size=512,
  intermediate_size=1024,
  num_layers=24,
  head_size=32,
  num_kv_heads=4,
)
MIB = 2**20


def _write(folder, config, dtype=np.float32):
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(config.to_hf()))
  random = np.random.default_rng(0)
  weights = {
    tensor.name: random.standard_normal(tensor.shape, np.float32).astype(dtype)
    for tensor in hf.tensors(config)
  }
  save_file(weights, folder / "model.safetensors")
  return weights


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
  folder = tmp_path_factory.mktemp("deep") / "model"
  return folder, _write(folder, DEEP)


@pytest.mark.parametrize("weight_dtype", [None, "int8"])
def test_the_host_holds_a_group_not_a_parameter(
  deep, monkeypatch, weight_dtype
):
  """8 devices of one process: 48 MiB of a kernel go through 4 MiB."""
  folder, weights = deep
  monkeypatch.setattr(placing, "GROUP_BYTES", 4 * MIB)
  spread = tiny.layout({"fsdp": 4, "tensor": 2})
  model = Model(DEEP, spread, weight_dtype=weight_dtype)
  tracemalloc.start()
  try:
    params = hf.load(folder, model)
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  kernel = params["layers"]["mlp"]["up"]["kernel"]
  assert kernel.size * 4 == 48 * MIB
  # Two groups; and on a CPU the smaller parameters, 6 MiB, stay where they were
  # read to.
  assert peak < 20 * MIB
  if weight_dtype is None:
    want = weights["model.layers.17.mlp.up_proj.weight"].T
    np.testing.assert_array_equal(kernel[17], want)


def _bytes_read(folder, layout, monkeypatch, devices=None):
  """What `load` takes out of the files, for some of the devices or all.

  Of a mapped file that is what the views have that are copied.
  """
  total = 0
  cut = hf.Tensor.from_file

  def counted(self, source, index):
    nonlocal total
    view = cut(self, source, index)
    if self.name != "model.embed_tokens.weight":
      assert isinstance(source.mapped, np.memmap)
      assert np.shares_memory(view, source.mapped)
    total += view.nbytes
    return view

  monkeypatch.setattr(hf.Tensor, "from_file", counted)
  if devices is not None:

    def only(shape, sharding, read):
      for device, index in sharding.devices_indices_map(shape).items():
        if device in devices:
          read(index)
      return jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding)

    monkeypatch.setattr(jax, "make_array_from_callback", only)
  hf.load(folder, Model(tiny.CONFIGS["qwen2"], layout))
  monkeypatch.undo()
  return total


@pytest.mark.parametrize(
  "sizes",
  [{"tensor": 2}, {"fsdp": 2}, {"replica": 2}],
  ids=lambda x: next(iter(x)),
)
def test_a_process_reads_what_its_devices_hold(sizes, tmp_path, monkeypatch):
  """Two devices as if each had a process of its own."""
  folder = tmp_path / "model"
  _write(folder, tiny.CONFIGS["qwen2"])
  layout = tiny.layout(sizes)
  abstract = jax.tree.leaves(
    Model(tiny.CONFIGS["qwen2"], layout).abstract_params()
  )
  held = 4 * sum(
    np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in abstract
  )
  for device in layout.mesh.devices.flat:
    assert _bytes_read(folder, layout, monkeypatch, {device}) == held
  # Both devices of one process share a reading of what both hold.
  shared = held if "replica" in sizes else 2 * held
  assert _bytes_read(folder, layout, monkeypatch) <= shared


def test_layers_that_are_spread_are_read_in_one_group(tmp_path):
  """A place may cut the layers too; groups of them would not fit it."""
  target = jax.ShapeDtypeStruct(
    (4, 6),
    np.float32,
    sharding=jax.sharding.NamedSharding(
      tiny.layout({"fsdp": 2}).mesh, PartitionSpec("fsdp")
    ),
  )
  rows = np.arange(24.0).reshape(4, 6)
  tensors = placing.Tensors(
    read=lambda number, index: rows[number][index],
    stacked=1,
    inputs=0,
    by_rows=False,
  )
  placed = placing.place(tensors, target)
  np.testing.assert_array_equal(placed, rows)
  assert placed.sharding == target.sharding
