"""Names of topologies, as Cloud TPU and as people write them."""

import pytest

from opd_jax.errors import InputError
from opd_jax.plan import topology


@pytest.mark.parametrize(
  ("text", "name", "chips", "devices"),
  [
    ("v5p:4x4x4", "v5p:4x4x4", 64, 64),
    ("v5p-128", "v5p:4x4x4", 64, 64),
    ("v5e-16", "v5e:4x4", 16, 16),
    ("v5litepod-16", "v5e:4x4", 16, 16),
    ("V6E-8", "v6e:2x4", 8, 8),
    ("v6e-64", "v6e:8x8", 64, 64),
    ("v4-8", "v4:2x2x1", 4, 4),
    ("tpu7x-128", "tpu7x:4x4x4", 64, 128),
    ("v5p:4x8x12", "v5p:4x8x12", 384, 384),
    ("2*v5e-256", "2*v5e:16x16", 512, 512),
    ("h100:8", "h100:1x8", 8, 8),
    ("h200:2x8", "h200:2x8", 16, 16),
  ],
)
def test_names(text, name, chips, devices):
  found = topology.parse(text)
  assert (found.name, found.chips, found.devices) == (name, chips, devices)
  assert topology.parse(found.name) == found


def test_slices_are_counted_in_one_place():
  assert topology.parse("v5e-16", slices=4).name == "4*v5e:4x4"
  assert topology.parse("2*v5e-16", slices=1).name == "v5e:4x4"


@pytest.mark.parametrize(
  "text",
  ["v9:4x4", "v5e:3x3", "v5e-12", "v5p:2x2", "v5p:5x5x5", "v5e", "h100:2x2x8"],
)
def test_what_is_not_there(text):
  with pytest.raises(InputError, match=r"v5e: 1x1 \(v5e-1\).*v6e.*h100:8") as e:
    topology.parse(text)
  assert repr(text) in str(e.value)


@pytest.mark.parametrize(
  ("text", "instead"),
  [
    ("h100:64", "h100:8x8"),
    ("h200:1x16", "h200:2x8"),
    ("a100:2x0", "a100:1x8"),
  ],
)
def test_a_machine_of_more_gpus_than_there_are(text, instead):
  with pytest.raises(InputError, match=f"1 to 8 GPUs, .* {instead}"):
    topology.parse(text)


def test_what_a_slow_network_joins():
  names = ("2*v5e-16", "v5e-16", "h100:4x8", "h100:8")
  assert [topology.parse(name).islands for name in names] == [2, 1, 4, 1]


def test_gpus_have_no_slices():
  with pytest.raises(InputError, match="h100:2x8"):
    topology.parse("2*h100:8")


def test_noise_of_the_library_is_kept_from_the_user(capfd):
  import os
  import sys

  with topology.quiet():
    os.write(2, b"noise\n")
    print("progress", file=sys.stderr)
  print("after", file=sys.stderr)
  assert capfd.readouterr().err == "progress\nafter\n"
