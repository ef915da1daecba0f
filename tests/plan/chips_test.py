"""The table of chips."""

import pytest

from opd_jax import chips


@pytest.mark.parametrize(
  ("kind", "name"),
  [
    ("TPU v4", "v4"),
    ("TPU v5 lite", "v5e"),
    ("TPU v5", "v5p"),
    ("TPU v6 lite", "v6e"),
    ("TPU7x", "tpu7x"),
    ("NVIDIA H100 80GB HBM3", "h100"),
    ("NVIDIA H200", "h200"),
    ("NVIDIA A100-SXM4-80GB", "a100"),
  ],
)
def test_jax_names_of_devices(kind, name):
  assert chips.find(kind) is chips.CHIPS[name]


def test_a_device_that_is_not_in_the_table():
  assert chips.find("cpu") is None


@pytest.mark.parametrize("chip", chips.CHIPS.values(), ids=chips.CHIPS)
def test_figures_are_of_one_device(chip):
  # Each generation's operations per byte lie between those of the A100 and
  # the v6e: a figure of a pod, or in another unit, would not.
  assert 150 < chip.flops / chip.bandwidth < 600
  assert 15 * 2**30 < chip.memory < 200 * 10**9
  assert chip.network < chip.link * chip.links < chip.bandwidth
