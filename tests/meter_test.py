"""What a record of the log is made of."""

import jax.numpy as jnp
import pytest

from opd_jax.meter import Meter, Work


def _meter(*steps):
  meter = Meter(lambda record: Work(tokens=1.0, operations=1.0))
  for values in steps:
    meter.add({name: jnp.float32(value) for name, value in values.items()})
  return meter


def test_a_part_counts_the_steps_that_have_it():
  """Means over steps; of `teacher/kl/NAME` over those with rows of NAME."""
  nan = float("nan")
  meter = _meter(
    {"train/loss": 1.0, "teacher/kl/code": 2.0, "teacher/kl/more": nan},
    {"train/loss": 3.0, "teacher/kl/code": nan, "teacher/kl/more": nan},
    {"train/loss": 5.0, "teacher/kl/code": 4.0, "teacher/kl/more": nan},
  )
  record = meter.close(3)
  assert record["train/loss"] == 3.0
  assert record["teacher/kl/code"] == 3.0
  assert "teacher/kl/more" not in record
  assert meter.steps == 0


def test_what_is_of_drawn_tokens_counts_the_steps_that_have_some():
  nan = float("nan")
  meter = _meter(
    {"teacher/kl": nan, "mismatch/max": nan, "drift/kl": nan},
    {"teacher/kl": 2.0, "mismatch/max": nan, "drift/kl": 0.5},
    {"teacher/kl": 4.0, "mismatch/max": nan, "drift/kl": nan},
  )
  record = meter.close(3)
  assert record["teacher/kl"] == 3.0
  assert record["drift/kl"] == 0.5
  assert "mismatch/max" not in record


def test_a_metric_that_is_not_a_number_stops_the_run():
  meter = _meter({"train/loss": 1.0}, {"train/loss": float("nan")})
  with pytest.raises(FloatingPointError, match="train/loss = nan"):
    meter.close(2)


def test_an_infinite_part_stops_it_too():
  meter = _meter({"train/loss": 1.0, "teacher/kl/code": float("inf")})
  with pytest.raises(FloatingPointError, match="teacher/kl/code = inf"):
    meter.close(1)
