"""Parameters into their places, a few layers at a time.

The tensors of a parameter, one per layer (and expert), are read in groups of
layers into the host's memory and put on the devices; there, the groups are
written into the parameter one after the other. So a host holds no more than two
groups, whatever the size of the parameter: the one that is read, and the one
before it as long as it is on its way.
"""

import functools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from opd_jax.models import quantize

# Of the host's memory; a single layer may take more.
GROUP_BYTES = 2**30
# Tensors that are read at the same time: one stream of a bucket is slow.
_READERS = 8

Index = tuple[slice, ...]
# The block of a tensor that a device holds, from the tensor's number.
Read = Callable[[int, Index], np.ndarray]


def place(read: Read, target: jax.ShapeDtypeStruct, stacked: int) -> jax.Array:
  """A parameter of floats.

  Args:
    read: a block of one of its tensors.
    target: its shape, dtype and place.
    stacked: how many leading axes count its tensors, of layers and experts.
  """
  if _layers_per_group(target, target.dtype, stacked) == target.shape[0]:
    return _group(read, target, target.dtype, stacked, 0, target.shape[0])
  whole = _empty(target)
  for start, group in _groups(read, target, target.dtype, stacked):
    whole = jax.block_until_ready(_write(whole, group, start, target.sharding))
    del group  # Before the next one is read.
  return whole


def place_quantized(
  read: Read,
  target: jax.ShapeDtypeStruct,
  scale: jax.ShapeDtypeStruct,
  stacked: int,
  inputs: int,
) -> tuple[jax.Array, jax.Array]:
  """A kernel as int8, and its scales; no more than a group is ever float.

  Args:
    read: see `place`.
    target: shape and place of the kernel.
    scale: of its scales.
    stacked: see `place`.
    inputs: how many of its other dimensions are contracted.
  """
  contracted = tuple(range(stacked, stacked + inputs))
  whole = _empty(target), _empty(scale)
  for start, group in _groups(read, target, jnp.float32, stacked):
    whole = _write_quantized(
      whole, group, start, (target.sharding, scale.sharding), contracted
    )
    jax.block_until_ready(whole)
    del group
  return whole


def _groups(
  read: Read, target: jax.ShapeDtypeStruct, dtype: Any, stacked: int
) -> Iterator[tuple[int, jax.Array]]:
  """Parts of a parameter along its first axis, and where they begin."""
  count = _layers_per_group(target, dtype, stacked)
  for start in range(0, target.shape[0], count):
    yield start, _group(read, target, dtype, stacked, start, count)


def _layers_per_group(
  target: jax.ShapeDtypeStruct, dtype: Any, stacked: int
) -> int:
  """A divisor of the layers, the same for every process."""
  layers = target.shape[0]
  shard = target.sharding.shard_shape(target.shape)
  if not stacked or shard[0] != layers:
    return layers
  devices = math.ceil(target.sharding.num_devices / jax.process_count())
  layer = math.prod(shard[1:]) * jnp.dtype(dtype).itemsize * devices
  most = max(GROUP_BYTES // layer, 1)
  return max(n for n in range(1, layers + 1) if layers % n == 0 and n <= most)


def _group(
  read: Read,
  target: jax.ShapeDtypeStruct,
  dtype: Any,
  stacked: int,
  start: int,
  count: int,
) -> jax.Array:
  """Layers [start, start + count), read and put on the devices."""
  shape = (count, *target.shape[1:])
  numbers = np.arange(math.prod(target.shape[:stacked]))
  numbers = numbers.reshape(target.shape[:stacked])
  if stacked:
    numbers = numbers[start : start + count]
  blocks: dict[Any, np.ndarray] = {}

  def block(index: Index | None) -> np.ndarray:
    bounds = [
      part.indices(size)[:2]
      for part, size in zip(index or (), shape, strict=True)
    ]
    key = tuple(bounds)
    if key not in blocks:
      # Devices that hold the same block share one reading of it.
      blocks[key] = _block(
        read, numbers, tuple(slice(*pair) for pair in bounds), dtype
      )
    return blocks[key]

  return jax.make_array_from_callback(shape, target.sharding, block)


def _block(
  read: Read, numbers: np.ndarray, index: Index, dtype: Any
) -> np.ndarray:
  """What one device holds of a group."""
  stacked = numbers.ndim
  here = numbers[index[:stacked]]
  sizes = [part.stop - part.start for part in index]
  found = np.empty(sizes, dtype)
  parts = found.reshape(-1, *sizes[stacked:])

  def fill(place: int) -> None:
    parts[place] = read(int(here.flat[place]), index[stacked:])

  with ThreadPoolExecutor(_READERS) as pool:
    list(pool.map(fill, range(len(parts))))
  return found


def _empty(target: jax.ShapeDtypeStruct) -> jax.Array:
  make = functools.partial(jnp.zeros, target.shape, target.dtype)
  return jax.jit(make, out_shardings=target.sharding)()


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _write(
  whole: jax.Array, group: jax.Array, start: int, place: NamedSharding
) -> jax.Array:
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
