"""What the makers say of their accelerators.

Per device as JAX sees it: of TPU v4 and v5p that is a chip with both of its
cores, of TPU7x one of the two cores of a chip, which share its links. Dense
bfloat16; a run that computes in float32 is measured against it too.

Sources: the system architecture pages of Cloud TPU (v4, v5e, v5p, v6e, tpu7x:
peak compute, HBM, ICI and data center network per chip) and NVIDIA's data
sheets of the SXM boards of A100 (80 GB), H100 and H200, with the network of
their DGX systems (a 200 or 400 Gb/s InfiniBand port per GPU). `memory` of a TPU
is what its compiler offers a program, a little less than is built in; of a GPU
the 75 % that jax takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
"""

import dataclasses
from collections.abc import Mapping

_GIB = 2**30
_TAKEN = 0.75


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """One kind of device.

  Attributes:
    kinds: how JAX's `device_kind` begins.
    memory: bytes of HBM that a program may use.
    flops: operations per second, dense bfloat16.
    bandwidth: of HBM, bytes per second.
    link: of one link to a neighbour, bytes per second and direction; of a GPU
      all its links to the switch together.
    links: that it has.
    network: bytes per second and direction to other slices, or other boxes.
    per_host: devices of a host.
    per_chip: devices that make up what is sold as one chip.
  """

  kinds: tuple[str, ...]
  memory: int
  flops: float
  bandwidth: float
  link: float
  links: int
  network: float
  per_host: int
  per_chip: int = 1


CHIPS: Mapping[str, Chip] = {
  "v4": Chip(
    kinds=("TPU v4",),
    memory=int(30.75 * _GIB),
    flops=275e12,
    bandwidth=1200e9,
    link=50e9,
    links=6,
    network=6.25e9,
    per_host=4,
  ),
  "v5e": Chip(
    kinds=("TPU v5 lite", "TPU v5e"),
    memory=int(15.75 * _GIB),
    flops=197e12,
    bandwidth=819e9,
    link=50e9,
    links=4,
    network=3.125e9,
    per_host=4,
  ),
  "v5p": Chip(
    kinds=("TPU v5p", "TPU v5"),
    memory=int(95.74 * _GIB),
    flops=459e12,
    bandwidth=2765e9,
    link=100e9,
    links=6,
    network=6.25e9,
    per_host=4,
  ),
  "v6e": Chip(
    kinds=("TPU v6 lite", "TPU v6e"),
    memory=int(31.25 * _GIB),
    flops=918e12,
    bandwidth=1638e9,
    link=100e9,
    links=4,
    network=12.5e9,
    per_host=4,
  ),
  "tpu7x": Chip(
    kinds=("TPU7x",),
    memory=int(94.75 * _GIB),
    flops=2307e12 / 2,
    bandwidth=7380e9 / 2,
    link=100e9 / 2,
    links=6,
    network=12.5e9 / 2,
    per_host=8,
    per_chip=2,
  ),
  "a100": Chip(
    kinds=("NVIDIA A100",),
    memory=int(_TAKEN * 80e9),
    flops=312e12,
    bandwidth=2039e9,
    link=300e9,
    links=1,
    network=25e9,
    per_host=8,
  ),
  "h100": Chip(
    kinds=("NVIDIA H100",),
    memory=int(_TAKEN * 80e9),
    flops=989e12,
    bandwidth=3350e9,
    link=450e9,
    links=1,
    network=50e9,
    per_host=8,
  ),
  "h200": Chip(
    kinds=("NVIDIA H200",),
    memory=int(_TAKEN * 141e9),
    flops=989e12,
    bandwidth=4800e9,
    link=450e9,
    links=1,
    network=50e9,
    per_host=8,
  ),
}


def find(device_kind: str) -> Chip | None:
  """The chip that JAX calls so; None for one not in the table."""
  fitting = [
    (len(kind), chip)
    for chip in CHIPS.values()
    for kind in chip.kinds
    if device_kind.startswith(kind)
  ]
  return max(fitting, key=lambda found: found[0])[1] if fitting else None
