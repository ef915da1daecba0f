"""The device mesh, and logical axis names as places on it.

Every array dimension has a logical name ("embed", "heads", "batch"); a table of
rules maps names to mesh axes. Two tables matter: weights in the training layout
are spread over fsdp x tensor; in the decode layout over tensor alone, because a
gather of weights over fsdp inside the decode loop would be paid per token.
`mesh.train_rules` and `mesh.decode_rules` of a config replace single rules.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import (
  AbstractMesh,
  AxisType,
  Mesh,
  NamedSharding,
  PartitionSpec,
)

from opd_jax.config import MeshConfig
from opd_jax.errors import InputError

MESH_AXES = ("replica", "fsdp", "tensor", "context", "expert")

# The memory of a host that its devices read by themselves.
HOST_MEMORY = "pinned_host"

Axes = tuple[str | None, ...]
Rule = str | tuple[str, ...] | None

TRAIN_RULES: Mapping[str, Rule] = {
  "batch": ("replica", "fsdp", "expert"),
  "sequence": "context",
  "layers": None,
  "vocab": "tensor",
  "embed": "fsdp",
  "heads": "tensor",
  "kv_heads": "tensor",
  "head_size": None,
  "ffw": "tensor",
  "experts": "expert",
  "norm": None,
}
DECODE_RULES = {**TRAIN_RULES, "embed": None}

# Fewer key/value heads than tensor shards is usual (GQA): replicate them then.
_REPLICATED_IF_UNEVEN = ("kv_heads",)
# What a model may get too few of; see `Layout.fitting`.
_IF_DIVISIBLE = ("batch", "sequence")


def make_mesh(
  sizes: Mapping[str, Any], devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """A mesh with the axes `MESH_AXES`; at most one size may be -1 (the rest).

  Inside a slice the order of the devices follows its network: an axis takes
  whole sides of its torus where the sizes allow, else parts of sides. Several
  slices, between which the network is slow, are spanned by `replica` as far as
  its size allows, and by `fsdp` for the rest.

  Args:
    sizes: by axis, 1 if absent; other keys of a `MeshConfig` are not read.
    devices: of the mesh; all by default.

  Raises:
    InputError: the sizes do not multiply to the number of devices, or the
      slices divide neither `replica` nor `fsdp`.
  """
  devices = list(jax.devices() if devices is None else devices)
  full = _fill(sizes, len(devices))
  slices = slices_of(devices)
  across = across_slices(full, len(slices))
  within = tuple(full[axis] // across[axis] for axis in MESH_AXES)
  types = (AxisType.Auto,) * len(MESH_AXES)
  parts = [_arranged(within, part) for part in slices]
  if len(parts) == 1:
    return Mesh(parts[0], MESH_AXES, axis_types=types)
  blocks = np.empty(len(parts), object)
  blocks[:] = parts
  return Mesh(
    np.block(blocks.reshape(tuple(across.values())).tolist()),
    MESH_AXES,
    axis_types=types,
  )


def _arranged(shape: Sequence[int], devices: list[jax.Device]) -> np.ndarray:
  """The devices of a slice as an array of this shape."""
  try:
    return jax.make_mesh(shape, MESH_AXES, devices=devices).devices
  except NotImplementedError:
    # No axis is a product of sides of the torus, such as 16 x 4 on 8x8.
    return mesh_utils.create_device_mesh(
      shape, devices, allow_split_physical_axes=True
    )


def abstract_mesh(
  sizes: Mapping[str, Any], devices: int, slices: int = 1
) -> Any:
  """As `make_mesh`, of so many devices that need not exist."""
  full = _fill(sizes, devices)
  across_slices(full, slices)
  types = (AxisType.Auto,) * len(MESH_AXES)
  return AbstractMesh(tuple(full.values()), MESH_AXES, axis_types=types)


def _fill(sizes: Mapping[str, Any], devices: int) -> dict[str, int]:
  """The size of every axis, -1 taking the rest of the devices."""
  full = {axis: sizes.get(axis, 1) for axis in MESH_AXES}
  known = math.prod(size for size in full.values() if size != -1)
  free = [axis for axis, size in full.items() if size == -1]
  if free and devices % known == 0:
    full[free[0]] = devices // known
  if math.prod(full.values()) != devices:
    shape = " x ".join(f"{axis}={size}" for axis, size in full.items())
    raise InputError(
      f"mesh {shape} does not cover the {devices} devices; make the sizes "
      "multiply to the device count, or set one of them to -1 to fill the rest"
    )
  return full


def slices_of(devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
  """Devices by slice: those that a fast network joins."""
  slices: dict[int, list[jax.Device]] = {}
  for device in devices:
    slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
  return [slices[index] for index in sorted(slices)]


def across_slices(sizes: Mapping[str, int], slices: int) -> dict[str, int]:
  """How many slices each axis spans.

  Raises:
    InputError: the slices divide neither `replica` nor `fsdp`.
  """
  replica = math.gcd(sizes["replica"], slices)
  fsdp = slices // replica
  if sizes["fsdp"] % fsdp:
    raise InputError(
      f"mesh replica={sizes['replica']} x fsdp={sizes['fsdp']} cannot span "
      f"{slices} slices; make mesh.replica a multiple of {slices}, so that "
      "only gradients cross between slices"
    )
  return {**dict.fromkeys(MESH_AXES, 1), "replica": replica, "fsdp": fsdp}


@dataclasses.dataclass(frozen=True)
class Layout:
  """A mesh with one table of rules; hashable, so it may be static."""

  mesh: Mesh
  rules: tuple[tuple[str, Rule], ...]

  @classmethod
  def create(cls, mesh: Mesh, rules: Mapping[str, Rule]) -> "Layout":
    """A layout from a table of rules such as `TRAIN_RULES`."""
    return cls(mesh, tuple(sorted(rules.items())))

  def spec(
    self, axes: Axes, shape: Sequence[int] | None = None
  ) -> PartitionSpec:
    """The place of an array whose dimensions have these logical names.

    Args:
      axes: a logical name or None (replicated) per dimension.
      shape: checked against the mesh if given.

    Raises:
      InputError: a name without a rule, a size its mesh axes do not divide, or
        two dimensions over one mesh axis.
    """
    rules = dict(self.rules)
    self._check_names(axes)
    entries = []
    for index, name in enumerate(axes):
      if name is None:
        entries.append(None)
        continue
      shards = self.shards(name)
      if shape is None or shape[index] % shards == 0:
        entries.append(rules[name])
      elif name in _REPLICATED_IF_UNEVEN:
        entries.append(None)
      else:
        raise InputError(
          f"{name} = {shape[index]} is not divisible by the {shards} shards "
          f"of mesh axes {rules[name]}; choose mesh sizes that divide it"
        )
    return PartitionSpec(*entries)

  def _check_names(self, axes: Axes) -> None:
    """Raises unless all have rules, which use a mesh axis once."""
    rules = dict(self.rules)
    owners: dict[str, str] = {}
    for name in filter(None, axes):
      if name not in rules:
        raise InputError(
          f"no sharding rule for logical axis {name!r}; known: {sorted(rules)}"
        )
      for axis in self.mesh_axes(name):
        if axis in owners:
          raise InputError(
            f"an array of {owners[axis]!r} x {name!r} cannot have both over "
            f"mesh axis {axis!r}; take it out of one of the two in "
            "mesh.train_rules or mesh.decode_rules"
          )
        owners[axis] = name

  def fitting(self, axes: Axes, shape: Sequence[int]) -> Axes:
    """Logical names, None for rows and slots that the mesh does not divide."""
    return tuple(
      None if name in _IF_DIVISIBLE and size % self.shards(name) else name
      for name, size in zip(axes, shape, strict=True)
    )

  def sharding(
    self, axes: Axes, shape: Sequence[int] | None = None
  ) -> NamedSharding:
    """`spec` on this mesh."""
    return NamedSharding(self.mesh, self.spec(axes, shape))

  def computing(self) -> "Layout":
    """This layout for what is computed with the slots of the rows.

    Batch and sequence keep their mesh axes; another dimension that lies on one
    of them too, as weights may, is gathered over it. Experts are left where
    they are: rows are brought to them.
    """
    taken = self.mesh_axes("batch") + self.mesh_axes("sequence")
    rules = dict(self.rules)
    for name in rules.keys() - {"batch", "sequence", "experts"}:
      if not set(self.mesh_axes(name)).isdisjoint(taken):
        rules[name] = tuple(a for a in self.mesh_axes(name) if a not in taken)
    return Layout.create(self.mesh, rules)

  def in_shard(self, name: str) -> "Layout":
    """This layout inside a map over the shards of batch or sequence."""
    rules = {**dict(self.computing().rules), name: None}
    return Layout.create(self.mesh, rules)

  def mesh_axes(self, name: str) -> tuple[str, ...]:
    """The mesh axes that a logical name is spread over."""
    entry = dict(self.rules)[name]
    return (entry,) if isinstance(entry, str) else entry or ()

  def place(self, array: np.ndarray, axes: Axes) -> jax.Array:
    """A host's array on the devices; each process places what its own hold.

    Args:
      array: the whole of it, the same on every process.
      axes: logical name of each dimension.
    """
    return jax.make_array_from_callback(
      array.shape, self.sharding(axes), lambda index: array[index]
    )

  def place_rows(self, array: np.ndarray) -> jax.Array:
    """As `place`, for an array [B, ...] whose first dimension is the batch."""
    return self.place(array, ("batch",) + (None,) * (array.ndim - 1))

  def shards(self, name: str) -> int:
    """How many pieces a dimension with this logical name is cut into."""
    return math.prod(self.mesh.shape[axis] for axis in self.mesh_axes(name))

  def replicated(self) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(self.mesh, PartitionSpec())

  def constrain(self, array: jax.Array, axes: Axes) -> jax.Array:
    """Pins an intermediate array inside jit to its place; see `computing`."""
    return jax.lax.with_sharding_constraint(
      array, self.computing().sharding(axes, array.shape)
    )

  def tree_shardings(self, axes: Any, shapes: Any) -> Any:
    """A sharding per leaf, from trees of logical axes and of shaped leaves."""
    return jax.tree.map(
      lambda names, leaf: self.sharding(names, leaf.shape),
      axes,
      shapes,
      is_leaf=lambda node: isinstance(node, tuple),
    )


def layouts(mesh: Mesh, config: MeshConfig) -> tuple[Layout, Layout]:
  """The training and the decode layout of a run, with the rules of its config.

  Raises:
    InputError: a rule for a logical name that there is not.
  """
  return (
    _layout(mesh, TRAIN_RULES, config.train_rules, "mesh.train_rules"),
    _layout(mesh, DECODE_RULES, config.decode_rules, "mesh.decode_rules"),
  )


def _layout(
  mesh: Mesh,
  table: Mapping[str, Rule],
  own: Mapping[str, Sequence[str]],
  key: str,
) -> Layout:
  unknown = sorted(own.keys() - table.keys())
  if unknown:
    raise InputError(
      f"{key}.{unknown[0]}: there is no such dimension; the rules are for "
      f"{', '.join(table)}"
    )
  rules = {name: tuple(axes) for name, axes in own.items()}
  return Layout.create(mesh, {**table, **rules})
