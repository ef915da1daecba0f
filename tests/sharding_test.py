"""Meshes of one slice and of several, and the rules of a config."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from opd_jax import sharding
from opd_jax.config import MeshConfig
from opd_jax.errors import InputError
from opd_jax.models import Model
from opd_jax.parsing import parse
from tests.models import tiny

# Weights spread along other dimensions than by default.
TRAIN_RULES = {
  "embed": [],
  "vocab": ["tensor", "fsdp"],
  "ffw": ["tensor", "fsdp"],
}


def layouts(sizes, **rules):
  mesh = sharding.make_mesh(sizes, jax.devices())
  return sharding.layouts(mesh, parse(MeshConfig, rules, "mesh."))


def test_rules_replace_single_defaults():
  train, decode = layouts(
    {"fsdp": 4, "tensor": 2},
    train_rules=TRAIN_RULES,
    decode_rules={"batch": ["replica"]},
  )
  assert train.spec(("vocab", "embed")) == PartitionSpec(("tensor", "fsdp"), ())
  assert train.spec(("heads", "head_size")) == PartitionSpec("tensor", None)
  assert decode.spec(("batch", "vocab")) == PartitionSpec(
    ("replica",), "tensor"
  )
  assert decode.spec(("vocab", "embed")) == PartitionSpec("tensor", None)


def test_the_batch_keeps_its_axes():
  """Weights lie on an axis of the batch; what is computed does not."""
  train, _ = layouts({"fsdp": 4, "tensor": 2}, train_rules=TRAIN_RULES)
  place = jax.jit(lambda x: train.constrain(x, ("batch", None, "vocab")))(
    np.zeros((8, 3, 8))
  )
  assert place.sharding.spec == PartitionSpec("fsdp", None, "tensor")
  inside = train.in_shard("batch")
  assert inside.mesh_axes("batch") == ()
  assert inside.mesh_axes("vocab") == ("tensor",)


@pytest.mark.parametrize(
  ("rules", "message"),
  [
    ({"train_rules": {"heads": ["model"]}}, "must list mesh axes, each of"),
    ({"train_rules": {"heads": "tensor"}}, "got 'tensor'; [] spreads"),
    ({"decode_rules": {"ffw": ["fsdp", "fsdp"]}}, "at most once"),
    (
      {"decode_rules": {"head": ["tensor"]}},
      "mesh.decode_rules.head: there is no such dimension; the rules are for "
      "batch, sequence, layers, vocab",
    ),
  ],
)
def test_a_rule_that_says_nothing(rules, message):
  with pytest.raises(InputError) as caught:
    layouts({"fsdp": 8}, **rules)
  assert message in str(caught.value)


def test_two_dimensions_over_one_axis():
  train, _ = layouts(
    {"fsdp": 4, "tensor": 2}, train_rules={"ffw": ["tensor", "fsdp"]}
  )
  with pytest.raises(
    InputError, match="'ffw' x 'embed' cannot have both over mesh axis 'fsdp'"
  ):
    Model(tiny.CONFIGS["llama"], train).abstract_params()


def test_a_name_without_a_rule():
  train, _ = layouts({"fsdp": 8})
  with pytest.raises(InputError, match="no sharding rule for logical axis 'v'"):
    train.spec(("v",))


@dataclasses.dataclass(frozen=True)
class Device:
  """As a runtime of several slices names it."""

  id: int
  slice_index: int
  platform: str = "of a test"
  device_kind: str = "none"


def devices_of(slices, each):
  """Dealt out, so that neighbours are of different slices."""
  return [
    Device(each * index + number, index)
    for number in range(each)
    for index in range(slices)
  ]


@pytest.mark.parametrize(
  ("sizes", "across"),
  [
    ({"replica": 2, "fsdp": 2, "tensor": 2}, ("replica",)),
    ({"replica": 4, "tensor": 2}, ("replica",)),
    ({"fsdp": 4, "tensor": 2}, ("fsdp",)),
  ],
)
def test_two_slices(sizes, across):
  """Along every other axis the devices are of one slice."""
  mesh = sharding.make_mesh(sizes, devices_of(2, 4))
  assert mesh.axis_names == sharding.MESH_AXES
  assert sorted(device.id for device in mesh.devices.flat) == [*range(8)]
  number = np.vectorize(lambda device: device.slice_index)(mesh.devices)
  for position, axis in enumerate(sharding.MESH_AXES):
    # Halves of the axis are slices, and each half is of one.
    changes = np.count_nonzero(np.diff(number, axis=position))
    other = number.size // number.shape[position]
    assert changes == (other if axis in across else 0), axis


def test_four_slices_over_two_axes():
  mesh = sharding.make_mesh({"replica": 2, "fsdp": 4}, devices_of(4, 2))
  number = np.vectorize(lambda device: device.slice_index)(mesh.devices)
  assert number.reshape(2, 4).tolist() == [[0, 0, 1, 1], [2, 2, 3, 3]]


@pytest.mark.parametrize(
  "sizes",
  [{"replica": 3, "tensor": 4}, {"tensor": -1}, {"fsdp": 3, "expert": 4}],
)
def test_slices_that_divide_no_axis(sizes):
  for make in (
    lambda: sharding.make_mesh(sizes, devices_of(2, 6)),
    lambda: sharding.abstract_mesh(sizes, 12, 2),
  ):
    with pytest.raises(InputError, match=r"make mesh\.replica a multiple"):
      make()


@dataclasses.dataclass(frozen=True)
class TorusDevice:
  """As a TPU runtime names a chip of a flat slice."""

  id: int
  coords: tuple[int, int, int]
  slice_index: int
  process_index: int = 0
  core_on_chip: int = 0
  platform: str = "tpu"
  device_kind: str = "TPU v6 lite"


@pytest.mark.parametrize(
  ("sizes", "slices"),
  [
    ({"fsdp": 8, "tensor": 8}, 1),
    ({"fsdp": 16, "tensor": 4}, 1),
    ({"fsdp": 2, "tensor": 32}, 1),
    ({"replica": 2, "fsdp": 16, "tensor": 4}, 2),
  ],
)
def test_sizes_that_are_no_sides_of_the_torus(sizes, slices):
  """Sides are split then; neighbours along an axis stay close."""
  devices = [
    TorusDevice(64 * index + 8 * y + x, (x, y, 0), index)
    for index in range(slices)
    for y in range(8)
    for x in range(8)
  ]
  mesh = sharding.make_mesh(sizes, devices)
  assert dict(mesh.shape) == {**dict.fromkeys(sharding.MESH_AXES, 1), **sizes}
  assert {device.id for device in mesh.devices.flat} == {*range(64 * slices)}
  # A group of "tensor" is a block of the slice, or a line of it.
  tensor = mesh.devices.reshape(-1, sizes["tensor"])
  for group in tensor:
    assert len({device.slice_index for device in group}) == 1
    spans = [
      1 + max(side) - min(side)
      for side in zip(*(device.coords for device in group), strict=True)
    ]
    assert np.prod(spans) == sizes["tensor"]
