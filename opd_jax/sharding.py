"""The device mesh, and logical axis names as places on it.

Every array dimension has a logical name ("embed", "heads", "batch"); a table of
rules maps names to mesh axes. Two tables matter: weights in the training layout
are spread over fsdp x tensor; in the decode layout over tensor alone, because a
gather of weights over fsdp inside the decode loop would be paid per token.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from opd_jax.errors import InputError

MESH_AXES = ("replica", "fsdp", "tensor", "context", "expert")

# The memory of a host that its devices read by themselves.
HOST_MEMORY = "pinned_host"

Axes = tuple[str | None, ...]

TRAIN_RULES: Mapping[str, str | tuple[str, ...] | None] = {
  "batch": ("replica", "fsdp", "expert"),
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


def make_mesh(
  sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """A mesh with the axes `MESH_AXES`; at most one size may be -1 (the rest).

  Raises:
    InputError: the sizes do not multiply to the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  full = {axis: sizes.get(axis, 1) for axis in MESH_AXES}
  known = math.prod(size for size in full.values() if size != -1)
  free = [axis for axis, size in full.items() if size == -1]
  if free and len(devices) % known == 0:
    full[free[0]] = len(devices) // known
  if math.prod(full.values()) != len(devices):
    shape = " x ".join(f"{axis}={size}" for axis, size in full.items())
    raise InputError(
      f"mesh {shape} does not cover the {len(devices)} devices; make the sizes "
      "multiply to the device count, or set one of them to -1 to fill the rest"
    )
  return jax.make_mesh(
    tuple(full.values()),
    MESH_AXES,
    axis_types=(AxisType.Auto,) * len(MESH_AXES),
    devices=devices,
  )


@dataclasses.dataclass(frozen=True)
class Layout:
  """A mesh with one table of rules; hashable, so it may be static."""

  mesh: Mesh
  rules: tuple[tuple[str, str | tuple[str, ...] | None], ...]

  @classmethod
  def create(
    cls, mesh: Mesh, rules: Mapping[str, str | tuple[str, ...] | None]
  ) -> "Layout":
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
      InputError: a name without a rule, or a size its mesh axes do not divide.
    """
    rules = dict(self.rules)
    entries = []
    for index, name in enumerate(axes):
      if name is None:
        entries.append(None)
        continue
      if name not in rules:
        raise InputError(
          f"no sharding rule for logical axis {name!r}; known: {sorted(rules)}"
        )
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

  def sharding(
    self, axes: Axes, shape: Sequence[int] | None = None
  ) -> NamedSharding:
    """`spec` on this mesh."""
    return NamedSharding(self.mesh, self.spec(axes, shape))

  def replace(self, name: str, entry: str | tuple[str, ...] | None) -> "Layout":
    """This layout with another rule for one logical name."""
    return Layout.create(self.mesh, {**dict(self.rules), name: entry})

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
    """Pins an intermediate array inside jit to its place."""
    return jax.lax.with_sharding_constraint(
      array, self.sharding(axes, array.shape)
    )

  def tree_shardings(self, axes: Any, shapes: Any) -> Any:
    """A sharding per leaf, from trees of logical axes and of shaped leaves."""
    return jax.tree.map(
      lambda names, leaf: self.sharding(names, leaf.shape),
      axes,
      shapes,
      is_leaf=lambda node: isinstance(node, tuple),
    )
