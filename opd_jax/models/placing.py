"""Parameters into their places, a few layers at a time.

The tensors of a parameter, one per layer (and expert), are read in groups of
layers into the host's memory and put on the devices; there, the groups are
written into the parameter one after the other. So a host holds no more than two
groups, whatever the size of the parameter: the one that is read, and the one
before it as long as it is on its way.

Files in a bucket are read by whole rows. There a group is cut along the rows of
the files first, so that each byte is fetched by one process only, and brought
into its place by the devices.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from opd_jax.models import quantize
from opd_jax.sharding import HOST_MEMORY

# Of the host's memory; a single layer may take more.
GROUP_BYTES = 2**30
# Tensors that are read at the same time: one stream of a bucket is slow.
_READERS = 8
# Rows of a file that are copied at a time.
_STRIP = 64

Index = tuple[slice, ...]
# The block of a tensor that a device holds, from the tensor's number.
Read = Callable[[int, Index], np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensors:
  """The tensors of a parameter.

  Attributes:
    read: a block of one of them.
    stacked: how many leading axes of the parameter count them, of layers and
      experts.
    inputs: how many of its other dimensions are contracted; the file has them
      behind the rest.
    by_rows: reading a part of a row costs as much as reading all of it.
  """

  read: Read
  stacked: int
  inputs: int
  by_rows: bool


def place(tensors: Tensors, target: jax.ShapeDtypeStruct) -> jax.Array:
  """A parameter of floats.

  Args:
    tensors: what it is made of.
    target: its shape, dtype and place.
  """
  final: Any = target.sharding
  if final.memory_kind == HOST_MEMORY:
    near = jax.ShapeDtypeStruct(
      target.shape, target.dtype, sharding=final.with_memory_kind("device")
    )
    return jax.device_put(place(tensors, near), final)
  reading = _Reading.of(tensors, target, target.dtype)
  if reading.count == target.shape[0] and reading.sharding == final:
    return reading.group(0)
  whole = _empty(target)
  for start in range(0, target.shape[0], reading.count):
    group = reading.group(start)
    whole = jax.block_until_ready(_write(whole, group, start, final))
    del group  # Before the next one is read.
  return whole


def place_quantized(
  tensors: Tensors, target: jax.ShapeDtypeStruct, scale: jax.ShapeDtypeStruct
) -> tuple[jax.Array, jax.Array]:
  """A kernel as int8, and its scales; no more than a group is ever float.

  Args:
    tensors: what it is made of.
    target: shape and place of the kernel.
    scale: of its scales.
  """
  first = tensors.stacked
  inputs = tuple(range(first, first + tensors.inputs))
  places: Any = (target.sharding, scale.sharding)
  whole = _empty(target), _empty(scale)
  reading = _Reading.of(tensors, target, jnp.float32)
  for start in range(0, target.shape[0], reading.count):
    group = reading.group(start)
    whole = _write_quantized(whole, group, start, places, inputs)
    jax.block_until_ready(whole)
    del group
  return whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Reading:
  """How a parameter is read.

  Attributes:
    tensors: what it is made of.
    shape: of the parameter.
    dtype: of what is read.
    sharding: of a group on the devices.
    count: layers of a group, a divisor of all; the same for every process.
  """

  tensors: Tensors
  shape: tuple[int, ...]
  dtype: Any
  sharding: NamedSharding
  count: int

  @classmethod
  def of(
    cls, tensors: Tensors, target: jax.ShapeDtypeStruct, dtype: Any
  ) -> "_Reading":
    """Groups of at most `GROUP_BYTES`, or of one layer."""
    sharding: Any = target.sharding
    if tensors.by_rows:
      sharding = _by_rows(tensors, target.shape, sharding)
    layers, *shard = sharding.shard_shape(target.shape)
    count = target.shape[0]
    if tensors.stacked and layers == count:
      devices = math.ceil(sharding.num_devices / jax.process_count())
      layer = math.prod(shard) * jnp.dtype(dtype).itemsize * devices
      most = max(GROUP_BYTES // layer, 1)
      fitting = range(1, min(layers, most) + 1)
      count = max(n for n in fitting if layers % n == 0)
    return cls(
      tensors=tensors,
      shape=target.shape,
      dtype=dtype,
      sharding=sharding,
      count=count,
    )

  def group(self, start: int) -> jax.Array:
    """Layers [start, start + count), read and put on the devices."""
    stacked = self.tensors.stacked
    shape = (self.count, *self.shape[1:])
    numbers = np.arange(math.prod(self.shape[:stacked]))
    numbers = numbers.reshape(self.shape[:stacked])
    if stacked:
      numbers = numbers[start : start + self.count]
    blocks: dict[Any, np.ndarray] = {}

    def block(index: Index | None) -> np.ndarray:
      bounds = tuple(
        part.indices(size)[:2]
        for part, size in zip(index or (), shape, strict=True)
      )
      if bounds not in blocks:
        # Devices that hold the same block share one reading of it.
        blocks[bounds] = self._block(numbers, [slice(*x) for x in bounds])
      return blocks[bounds]

    return jax.make_array_from_callback(shape, self.sharding, block)

  def _block(self, numbers: np.ndarray, index: Sequence[slice]) -> np.ndarray:
    """What one device holds of a group."""
    stacked = self.tensors.stacked
    here = numbers[*index[:stacked]]
    sizes = [part.stop - part.start for part in index]
    found = np.empty(sizes, self.dtype)
    parts = found.reshape(-1, *sizes[stacked:])

    def fill(place: int) -> None:
      number = int(here.flat[place])
      _copy(self.tensors.read(number, tuple(index[stacked:])), parts[place])

    with ThreadPoolExecutor(_READERS) as pool:
      list(pool.map(fill, range(len(parts))))
    return found


def _by_rows(
  tensors: Tensors, shape: tuple[int, ...], place: NamedSharding
) -> NamedSharding:
  """A place that cuts the rows of the files, over all devices if they divide.

  Then every byte is read once, by one device; the rest is between devices.
  """
  first = tensors.stacked
  rows = first + tensors.inputs
  entries = [*place.spec, *[None] * (len(shape) - len(place.spec))]
  axes = [
    (entry,) if isinstance(entry, str) else entry or () for entry in entries
  ]
  taken = {axis for part in axes[:first] for axis in part}
  chosen = list(axes[rows])
  for axis, size in place.mesh.shape.items():
    shards = math.prod(place.mesh.shape[name] for name in chosen) * size
    if axis not in (*taken, *chosen) and shape[rows] % shards == 0:
      chosen.append(axis)
  cut = [*entries[:first], *[None] * (len(shape) - first)]
  cut[rows] = tuple(chosen)
  return NamedSharding(place.mesh, PartitionSpec(*cut))


def _copy(source: np.ndarray, target: np.ndarray) -> None:
  """Copies and casts in strips of what is outermost in the source's memory.

  A transposed copy of a large matrix in one go misses the cache with every
  number: a strip of 64 rows at a time is two to four times as fast.
  """
  axis = int(np.argmax(np.abs(source.strides)))
  lead = (slice(None),) * axis
  for start in range(0, source.shape[axis], _STRIP):
    strip = (*lead, slice(start, start + _STRIP))
    target[strip] = source[strip]


def _empty(target: jax.ShapeDtypeStruct) -> jax.Array:
  make = functools.partial(jnp.zeros, target.shape, target.dtype)
  return jax.jit(make, out_shardings=target.sharding)()


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _write(
  whole: jax.Array, group: jax.Array, start: int, place: NamedSharding
) -> jax.Array:
  group = jax.lax.with_sharding_constraint(group, place)
  whole = jax.lax.dynamic_update_slice_in_dim(whole, group, start, 0)
  return jax.lax.with_sharding_constraint(whole, place)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=(3, 4))
def _write_quantized(
  whole: tuple[jax.Array, jax.Array],
  group: jax.Array,
  start: int,
  places: tuple[NamedSharding, NamedSharding],
  inputs: tuple[int, ...],
) -> tuple[jax.Array, jax.Array]:
  parts = quantize.quantize(group, inputs)
  return tuple(
    jax.lax.with_sharding_constraint(
      jax.lax.dynamic_update_slice_in_dim(old, new, start, 0), place
    )
    for old, new, place in zip(whole, parts, places, strict=True)
  )
