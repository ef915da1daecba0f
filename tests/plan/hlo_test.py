"""Bytes and collectives of programs whose figures are known."""

import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from opd_jax.plan import hlo
from opd_jax.sharding import make_mesh

# A decode loop as the TPU compiler writes it: a cache [3, 10, 200] bf16, of
# which tiles of (8, 128) take 3 x 16 x 256; a weight [128, 512] that a copy
# brings to VMEM; an unknown number of turns around three.
TPU = (pathlib.Path(__file__).parent / "decode_tpu.txt").read_text()
SLICE = 16 * 256 * 2
ROW = 8 * 256 * 2
WEIGHT = 128 * 512 * 2
ALONG_A = (0, 2, 4, 6)


@pytest.fixture(scope="module")
def decode():
  program = hlo.analyse(TPU)
  assert [loop.scope for loop in program.walk()] == [
    "",
    "decode_loop",
    "decode_loop",
  ]
  assert [loop.turns for loop in program.walk()] == [1, None, 3]
  return program.find("decode_loop")


def test_a_loop_reads_slices_and_sets_in_place(decode):
  (layers,) = decode.loops
  assert layers.bytes_per_turn() == ROW + SLICE + WEIGHT


def test_what_moves_more_than_it_must_comes_first(decode):
  moves = decode.moves()
  copied = 3 * SLICE
  transposed = 200 * 16 * 128 * 2
  by_name = {move.operation.name: move for move in moves}
  # The cache was read by the layers already: the copy reads it again.
  assert by_name["whole"].bytes == copied + transposed
  assert by_name["whole"].excess == copied + transposed
  # The weight is read by the first layer; the others and the slice again.
  assert by_name["load"].bytes == 3 * WEIGHT
  assert by_name["load"].excess == 2 * WEIGHT
  assert by_name["half"].excess == by_name["half"].bytes == WEIGHT // 2
  assert by_name["slice.1"].runs == 3
  assert by_name["slice.1"].bytes == 3 * SLICE
  assert by_name["slice.1"].excess == 0
  assert [m.excess for m in moves] == sorted(
    (m.excess for m in moves), reverse=True
  )


def test_collectives_with_their_groups(decode):
  found = {c.kind: (c, runs) for c, runs in decode.turn_collectives()}
  gather, runs = found["all-gather"]
  assert (runs, gather.devices, gather.payload) == (1, ALONG_A, 4 * WEIGHT)
  assert gather.weights
  assert gather.axes({"a": 4, "b": 2}) == ("a",)
  reduce, runs = found["all-reduce"]
  assert (runs, reduce.devices, reduce.payload) == (3, ALONG_A, WEIGHT)


def test_what_a_turn_makes_anew_is_no_weight():
  """Though it comes out of a tuple at the place of what was there before."""
  shape = "bf16[128,512]{1,0:T(8,128)(2,1)}"
  made = (
    f'  %made = ({shape}, {shape}, {shape}) custom-call(%w), custom_call="f"\n'
    f"  %made.2 = {shape} get-tuple-element(%made), index=2\n  ROOT %r = "
  )
  text = TPU.replace("  ROOT %r = ", made).replace(
    "%set.1, %w)", "%set.1, %made.2)"
  )
  found = {c.kind: c for c, _ in hlo.analyse(text).turn_collectives()}
  assert not found["all-reduce"].weights
  # What is handed on as it is counts as one.
  assert hlo.analyse(TPU).find("decode_loop").loops[0].collectives[0].weights


RING = (
  "  %passed = bf16[128,512]{1,0:T(8,128)(2,1)} collective-permute(%w), "
  "source_target_pairs={{0,2},{2,4},{4,6},{6,0}}\n  ROOT %r = "
)


def test_a_weight_that_goes_round_a_ring_is_gathered():
  """Each turn of the layers passes on what the last one was given."""
  text = TPU.replace("  ROOT %r = ", RING).replace(
    "%set.1, %w)", "%set.1, %passed)"
  )
  found = {c.kind: c for c, _ in hlo.analyse(text).turn_collectives()}
  permute = found["collective-permute"]
  assert permute.weights
  assert permute.payload == WEIGHT
  # The cache, of which each token makes another, is no weight.
  text = text.replace("collective-permute(%w)", "collective-permute(%set.1)")
  found = {c.kind: c for c, _ in hlo.analyse(text).turn_collectives()}
  assert not found["collective-permute"].weights


@pytest.mark.parametrize(
  ("groups", "devices"),
  [
    ("replica_groups={{1,3},{0,2}}", (1, 3)),
    ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
    ("replica_groups={}", tuple(range(8))),
    ("replica_groups=mesh['a'=2,'b'=4] {'a','b':(1)2}", (0, 2, 4, 6)),
    ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", (0, 1)),
  ],
)
def test_ways_to_write_a_group(groups, devices):
  text = TPU.replace("replica_groups=[2,4]<=[4,2]T(1,0)", groups)
  found = {
    collective.kind: collective.devices
    for collective, _ in hlo.analyse(text).turn_collectives()
  }
  assert found["all-reduce"] == devices


def test_scopes_are_those_that_people_wrote():
  name = "jit(train)/rollout/decode_loop/while/body/closed_call/jit(_take)/x"
  assert hlo.scope_of(name) == "rollout/decode_loop/x"
  name = "jit(f)/transpose(jvp(gradient))/while/body/a,b->c/dot_general"
  assert hlo.scope_of(name) == "transpose(jvp(gradient))/a,b->c/dot_general"


ASYNC = """\
HloModule jit_f, num_partitions=1

%inside (p: f32[32,128], q: s32[32]) -> f32[32,128] {
  %p = f32[32,128]{1,0} parameter(0)
  %q = s32[32]{0} parameter(1)
  ROOT %g = f32[32,128]{1,0} gather(%p, %q), slice_sizes={1,128}
}

ENTRY %main (a: f32[32,128], b: s32[32]) -> f32[32,128] {
  %a = f32[32,128]{1,0} parameter(0)
  %b = s32[32]{0} parameter(1)
  START
  ROOT %d = f32[32,128]{1,0} async-done(%u)
}
"""


@pytest.mark.parametrize(
  "start",
  [
    "%s = ((), (), u32[]) async-start(), calls=%inside\n"
    "  %u = ((), f32[32,128]{1,0}, u32[]) async-update(%s, %a, %b)",
    "%u = ((), f32[32,128]{1,0}, u32[]) async-start(%a, %b), calls=%inside",
  ],
)
def test_work_beside_other_work_counts_once(start):
  """Also where it is started first and given its operands later."""
  program = hlo.analyse(ASYNC.replace("START", start))
  assert program.bytes_per_turn() == 2 * 32 * 128 * 4 + 32 * 4


def test_a_bound_beside_another_condition():
  """Of turns that end early the bound is known, those of rows are not."""
  last = "  ROOT %lt = pred[]{:T(512)} compare(%j, %bound), direction=LT"
  both = (
    "  %lt = pred[]{:T(512)} compare(%j, %bound), direction=LT\n"
    '  %more.1 = pred[]{:T(512)} custom-call(), custom_call_target="Sharding"\n'
    "  ROOT %both = pred[]{:T(512)} and(%more.1, %lt)"
  )
  text = TPU.replace(last, both)
  assert text != TPU
  (layers,) = hlo.analyse(text).find("decode_loop").loops
  assert layers.turns == 3


def test_text_that_is_no_module():
  with pytest.raises(ValueError, match="optimised HLO"):
    hlo.analyse("module @jit_f {}")


def test_a_compiled_scan_counts_slices_and_turns():
  """Layers of a scan read their own weights, and set one row of a buffer."""
  layers, width, rows = 5, 256, 64

  def body(carry, weight):
    x, buffer, index = carry
    x = jnp.tanh(x @ weight)
    buffer = jax.lax.dynamic_update_index_in_dim(buffer, x[0], index, 0)
    return (x, buffer, index + 1), None

  def run(x, buffer, weights):
    return jax.lax.scan(body, (x, buffer, 0), weights)[0]

  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
  compiled = (
    jax.jit(run, donate_argnums=1)
    .lower(shape(rows, width), shape(512, width), shape(layers, width, width))
    .compile()
  )
  program = hlo.analyse(compiled.as_text())
  (loop,) = program.loops
  assert loop.turns == layers
  moved = loop.bytes_per_turn()
  weight, state = width * width * 4, rows * width * 4
  # At least the weight and the state in and out; at most the weight once more
  # as a copy, and the state a few times, but never the buffer of 512 rows.
  assert weight + 2 * state <= moved < 3 * weight + 8 * state


@pytest.mark.parametrize("gathered_before", [False, True])
def test_weights_gathered_in_the_decode_loop_are_found(gathered_before):
  """Spread over fsdp they are gathered for every token, unless before."""
  mesh = make_mesh({"fsdp": 4, "tensor": 2})
  place = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))

  def run(x, weights):
    if gathered_before:
      weights = jax.lax.with_sharding_constraint(
        weights, place(None, None, "tensor")
      )

    def layer(x, weight):
      y = jnp.tanh(x @ weight)
      y = jax.lax.with_sharding_constraint(y, place("fsdp"))
      return y, None

    def token(state):
      x, going = state
      x, _ = jax.lax.scan(layer, x, weights)
      return x, going & jnp.all(x < 2)

    with jax.named_scope("decode_loop"):
      return jax.lax.while_loop(lambda s: s[1], token, (x, True))[0]

  x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=place("fsdp"))
  weights = jax.ShapeDtypeStruct(
    (3, 64, 64), jnp.float32, sharding=place(None, "fsdp", "tensor")
  )
  text = jax.jit(run).lower(x, weights).compile().as_text()
  program = hlo.analyse(text)
  loop = program.find("decode_loop")
  gathers = [
    (collective.axes(dict(mesh.shape)), runs)
    for collective, runs in loop.turn_collectives()
    if collective.kind == "all-gather" and collective.weights
  ]
  everywhere = [c for c, _ in program.turn_collectives() if c.weights]
  assert everywhere
  assert bool(gathers) == (not gathered_before)
  assert all("fsdp" in axes and runs == 3 for axes, runs in gathers)
