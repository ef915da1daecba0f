"""The time model, by hand."""

import dataclasses

import jax
import pytest

from opd_jax import chips, flops
from opd_jax.memory import shard_bytes
from opd_jax.plan import timing
from opd_jax.plan.traffic import Collective, Loop, Operation, Read
from opd_jax.sharding import MESH_AXES
from tests import engine

CHIP = chips.Chip(
  kinds=("X",),
  memory=1,
  flops=100.0,
  bandwidth=10.0,
  link=2.0,
  links=4,
  network=0.5,
  per_host=4,
  per_chip=2,
)


def test_seconds_by_hand():
  works = {
    # 4 s of compute hide 3 s of memory; 8 bytes take 2 s over two links.
    "sample": timing.Work(operations=400.0, hbm=30.0, links=8.0),
    # 5 s of memory; 1 byte takes 2 s between slices, a million hops 1 s.
    "update": timing.Work(operations=100.0, hbm=50.0, network=1.0, hops=1e6),
  }
  found = timing.predict(CHIP, works, tokens=56.0, devices=8)
  sample, update = found.phases
  assert (sample.seconds, sample.bound) == (6.0, "compute")
  assert (update.seconds, update.bound) == (8.0, "memory")
  assert found.seconds == 14.0
  assert found.shares == {"sample": 6 / 14, "update": 8 / 14}
  # Eight devices are four chips.
  assert found.tokens_per_second_per_chip == 56 / 14 / 4


def test_a_gpu_sends_over_all_its_links_at_once():
  gpu = dataclasses.replace(CHIP, link=8.0, links=1)
  works = {"update": timing.Work(links=16.0)}
  found = timing.predict(gpu, works, tokens=1.0, devices=2)
  assert found.seconds == 2.0


@pytest.mark.parametrize(
  ("name", "phase"),
  [
    ("jit(train)/rollout/decode_loop/while/body/add", "sample"),
    ("jit(train)/gradient/teacher/while/body/dot_general", "score"),
    ("jit(train)/gradient/jvp(reference)/dot_general", "score"),
    ("jit(train)/gradient/transpose(jvp(student))/dot_general", "update"),
    ("", "update"),
  ],
)
def test_phases_by_the_names_of_operations(name, phase):
  assert timing.phase_of(name) == phase


# Two slices, or one, under a mesh of replica and fsdp.
REPLICAS = {"replica": 2, "fsdp": 1}
HALVES = {"replica": 1, "fsdp": 2}
ALONE = dict.fromkeys(MESH_AXES, 1)


def loop(kind, payload, devices, across=REPLICAS):
  """Three turns, each with a collective and 12 bytes, inside the rollout."""
  source = "jit(train)/rollout/decode_loop/while/body/x"
  body = Loop(
    scope="rollout/decode_loop",
    name="while",
    turns=3,
    operations=(
      Operation(
        name="add",
        opcode="add",
        source=source,
        reads=(Read(array="a", bytes=8, whole=8),),
        written=4,
        updated=0,
      ),
    ),
    collectives=(
      Collective(
        kind=kind, name="c", source=source, payload=payload, devices=devices
      ),
    ),
    loops=(),
    carried=frozenset(),
  )
  program = dataclasses.replace(
    body, scope="", turns=1, operations=(), collectives=(), loops=(body,)
  )
  estimate = {name: timing.Work(operations=7.0) for name in timing.PHASES}
  return timing.measured([program], estimate, {"replica": 2, "fsdp": 4}, across)


def test_rings_inside_a_slice():
  works = loop("all-gather", 400, (0, 1, 2, 3))
  assert works["sample"] == timing.Work(
    operations=7.0, hbm=36, links=3 * 300, hops=3 * 2
  )
  assert works["update"] == timing.Work(operations=7.0)
  assert loop("all-reduce", 400, (0, 1, 2, 3))["sample"].links == 3 * 600
  assert loop("collective-permute", 400, (0, 1))["sample"].links == 3 * 400


def test_rings_over_slices_send_a_share_between_them():
  # Inside each slice all-reduce 400; then quarters of it between two slices.
  sample = loop("all-reduce", 400, tuple(range(8)))["sample"]
  assert (sample.links, sample.network) == (3 * 600, 3 * 2 * 100 / 2)
  alone = loop("all-reduce", 400, (0, 4))["sample"]
  assert (alone.links, alone.network) == (0, 3 * 400)


def test_an_axis_that_spans_slices_does_so_in_part():
  # Of four shards two are in each slice.
  found = loop("all-gather", 400, (0, 1, 2, 3), HALVES)["sample"]
  assert (found.links, found.network) == (3 * 200, 3 * 100)
  # Neighbours of one slice, and of two.
  found = loop("collective-permute", 400, (0, 1), HALVES)["sample"]
  assert (found.links, found.network) == (3 * 400, 0)
  found = loop("collective-permute", 400, (1, 2), HALVES)["sample"]
  assert (found.links, found.network) == (0, 3 * 400)


@pytest.fixture(scope="module")
def step():
  return engine.make_step("gkd")


def test_an_estimate_of_one_device(step):
  works = timing.estimated(step, prompts=4, window=6, across=ALONE)
  student, teacher = step.scorer.student, step.scorer.teacher
  rows, drawn = 4 * step.rollouts, step.sampling.max_new_tokens
  slots = 6 + drawn
  assert works["score"].operations == flops.forward(
    teacher.config, rows * slots, slots / 2, rows * drawn
  )
  assert works["update"].operations == 3 * flops.forward(
    student.config, rows * slots, slots / 2, rows * drawn
  )
  weights = shard_bytes(student.abstract_params())
  config = student.config
  numbers = config.num_layers * rows * slots * config.num_kv_heads
  cached = 2 * numbers * config.head_size * 4 + rows * slots * 4
  assert works["sample"].hbm == weights + drawn * (weights + cached)
  assert all(w.links == w.hops == w.network == 0 for w in works.values())


def test_an_estimate_shares_the_work_and_pays_for_it(step):
  alone = timing.estimated(step, prompts=4, window=6, across=ALONE)
  mesh = {"fsdp": 2, "tensor": 2}
  spread = timing.estimated(
    engine.make_step("gkd", mesh=mesh, devices=4),
    prompts=4,
    window=6,
    across=ALONE,
  )
  for name in timing.PHASES:
    assert spread[name].operations * 4 == pytest.approx(alone[name].operations)
    assert spread[name].hbm < alone[name].hbm
    assert spread[name].links > 0
    assert spread[name].hops > 0


def test_an_estimate_of_two_boxes():
  """Shards over both send half as much within them, and as much between."""
  mesh = {"replica": 2, "fsdp": 4}
  step = engine.make_step("gkd", mesh=mesh, devices=8)
  student = step.scorer.student
  trained = student.abstract_trained()
  gradients = shard_bytes(trained)
  norms = sum(
    shard_bytes(leaf)
    for leaf in jax.tree.leaves(trained)
    if leaf.sharding.is_fully_replicated
  )

  def estimated(across):
    return timing.estimated(
      step, prompts=8, window=6, across={**ALONE, **across}
    )

  one, replicas, halves = (
    estimated(across) for across in ({}, REPLICAS, HALVES)
  )
  assert all(work.network == 0 for work in one.values())
  # Only gradients cross: of each shard, there and back, half; of norms, which
  # every device holds, four devices of a box carry a quarter each.
  assert replicas["sample"].network == replicas["score"].network == 0
  assert replicas["update"].network == pytest.approx(gradients - norms * 3 / 4)
  assert halves["sample"].network > 0
  # A ring of four sends 3/4; of two boxes 1/2 within and 1/4 between.
  score = one["score"].links
  assert halves["score"].links == pytest.approx(score * 2 / 3)
  assert halves["score"].network == pytest.approx(score / 3)


def test_axes_of_the_mesh_are_those_of_a_collective():
  sizes = dict.fromkeys(MESH_AXES, 1) | {"fsdp": 2, "tensor": 4}
  collective = Collective(
    kind="all-gather", name="c", source="", payload=1, devices=(1, 5)
  )
  assert jax.device_count() == 8
  assert collective.axes(sizes) == ("fsdp",)
