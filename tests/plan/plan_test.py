"""`opd-jax plan`: counted, compiled by the TPU compiler, and mended."""

import importlib.util
import json
import math
import os
import types

import jax
import pytest
from jax.experimental import topologies

from opd_jax import cli, memory, parsing
from opd_jax.config import RunConfig
from opd_jax.errors import InputError
from opd_jax.models import published
from opd_jax.plan import compiling, fit, remedies, topology

NO_LIBTPU = (
  "no libtpu: `make unit` has it; for pytest alone, put .venv/plan (of `make "
  "setup`) on PYTHONPATH"
)
LIBTPU = importlib.util.find_spec("libtpu") is not None


def compiles(test):
  """Marks a test that needs the TPU compiler, and its time."""
  skip = pytest.mark.skipif(not LIBTPU, reason=NO_LIBTPU)
  return pytest.mark.slow(skip(test))


TINY = {
  "model_type": "qwen3",
  "vocab_size": 512,
  "hidden_size": 256,
  "intermediate_size": 512,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 128,
  "max_position_embeddings": 40960,
  "tie_word_embeddings": True,
}
CONFIG_FILE = """\
import pathlib

HERE = pathlib.Path(__file__).parent


def get_config():
  return {
    "student": {"path": str(HERE / "tiny"), "compute_dtype": "bfloat16"},
    "teacher": {"path": str(HERE / "tiny"), "compute_dtype": "bfloat16"},
    "data": {
      "sources": {"mine": {"path": "not/there.jsonl"}},
      "max_prompt_tokens": 64,
    },
    "sampling": {"max_new_tokens": 64},
    "batch": {"prompts": 64},
    "objective": {"name": "opd_k1"},
    "topology": "v5e:2x2",
    "mesh": {"fsdp": 2, "tensor": 2},
    "steps": 10,
  }
"""


@pytest.fixture(scope="session")
def run(tmp_path_factory):
  """A config, and of its model the config.json alone."""
  folder = tmp_path_factory.mktemp("plan")
  (folder / "tiny").mkdir()
  (folder / "tiny" / "config.json").write_text(json.dumps(TINY))
  (folder / "run.py").write_text(CONFIG_FILE)
  return folder


@pytest.fixture(autouse=True)
def environment(monkeypatch):
  """The command sets variables for this process alone.

  That which turns the cache off comes too late here, where jax has started:
  nothing is written to it, and what is not there is not read.
  """
  for name in ("JAX_PLATFORMS", "JAX_ENABLE_COMPILATION_CACHE"):
    monkeypatch.setenv(name, os.environ.get(name, ""))
  option = "jax_persistent_cache_min_compile_time_secs"
  least = getattr(jax.config, option)
  jax.config.update(option, 1e9)
  yield
  jax.config.update(option, least)


def plan(run, *arguments):
  return cli.main(["plan", f"--config={run / 'run.py'}", *arguments])


def test_counts_without_a_compiler_or_files(run, capfd, monkeypatch):
  monkeypatch.setattr(compiling, "compile_step", None)
  file = run / "counted.json"
  assert plan(run, "--analytic", f"--json={file}") == 0
  told = capfd.readouterr().out
  assert "v5e:2x2: 4 chips" in told
  assert "fits by this count" in told
  figures = json.loads(file.read_text())
  parts = figures["estimate"]["parts"]
  # float32 weights over 4 devices; two moments as well.
  weights = 4 * parameters() // 4
  assert parts["student weights"]["bytes"] == pytest.approx(weights, rel=0.01)
  assert figures["memory_bytes"] == topology.parse("v5e-4").device.memory
  speed = figures["speed"]
  assert not speed["compiled"]
  assert sum(p["share"] for p in speed["phases"].values()) == pytest.approx(1)


def parameters():
  heads = (4 + 2 * 2 + 4) * 128 * 256
  return 2 * (heads + 3 * 256 * 512) + 512 * 256


def test_gpus_are_counted(run, capfd):
  assert plan(run, "--topology=h100:1x4") == 0
  told = capfd.readouterr().out
  assert "GPUs are never compiled for here" in told
  assert "fits by this count" in told
  # The names of files and models come first.
  assert all(len(line) <= 80 for line in told.splitlines()[2:])


@pytest.mark.parametrize("prompts", [16384, 65536])
def test_changes_by_the_count_alone(run, capfd, monkeypatch, prompts):
  """Of 32,768 rows half fit, twice as many do not."""
  change = remedies.Change(overrides=(f"batch.prompts={prompts}",), alters="a")
  monkeypatch.setattr(remedies, "changes", lambda *run: iter([change]))
  file = run / "counted.json"
  too_large = ("--config.batch.prompts=32768", "--topology=h100:1x4")
  assert plan(run, *too_large, f"--json={file}") == 1
  told, err = capfd.readouterr()
  assert err == "looking for changes with which it fits\n"
  figures = json.loads(file.read_text())
  assert figures["memory_bytes"] == 60e9
  assert figures["estimate"]["total_bytes"] > 60e9
  if prompts > 32768:
    assert "no change was found with which it fits" in told
    assert figures["remedies"] == []
    return
  assert "changes with which it fits, by this count:" in told
  assert f"--config.batch.prompts={prompts}  (a)" in told
  (remedy,) = figures["remedies"]
  assert 30e9 < remedy["total_bytes"] <= 60e9
  assert remedy["fits"]
  assert remedy["compile_seconds"] is None
  assert plan(run, *too_large, "--noremedies") == 1
  assert "change" not in capfd.readouterr().out


def test_boxes_are_joined_by_a_slower_network(run, capfd):
  seconds = []
  for name in ("h100:1x8", "h100:8x1"):
    file = run / "boxes.json"
    assert (
      plan(
        run,
        f"--topology={name}",
        "--config.mesh.fsdp=8",
        "--config.mesh.tensor=1",
        f"--json={file}",
      )
      == 0
    )
    seconds.append(json.loads(file.read_text())["speed"]["seconds"])
  assert seconds[0] < seconds[1]
  capfd.readouterr()


def test_a_config_of_sft_is_refused(run, capfd):
  assert cli.main(["plan", "--config=configs/arith_sft.py", "--analytic"]) == 2
  assert "plan is for the configs of train" in capfd.readouterr().err


def test_without_the_compiler_it_says_what_to_install(run, capfd, monkeypatch):
  def missing(**options):
    raise RuntimeError("no libtpu")

  monkeypatch.setattr(topologies, "get_topology_desc", missing)
  assert plan(run) == 2
  error = capfd.readouterr().err.splitlines()[-1]
  assert 'pip install "opd-jax[plan]"; --analytic' in error


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (["--topology=v9:2x2"], ["no topology 'v9:2x2'", "v5e: 1x1"]),
    (["--topology=v5e-16"], ["does not cover the 16 devices", "set one"]),
    (["--config.mesh.tensor=3"], ["does not cover the 4 devices"]),
    (["--config.batch.prompts=3"], ["prompts = 3 is not divisible"]),
    (["--config.topology=None"], ["names no topology", "--topology"]),
    (["--config.student.path=acme/x"], ["hf download acme/x config.json"]),
    (["--config.sampling.max_new_tokens=50000"], ["window of 40960"]),
    (["--config.teacher=None"], ["teacher"]),
  ],
)
def test_mistakes_are_one_line(run, arguments, words, capfd):
  assert plan(run, "--analytic", *arguments) == 2
  (line,) = capfd.readouterr().err.splitlines()
  assert all(word in line for word in words), line


GIB = 2**30
SHORT = """\
RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the \
total memory required for HLO temporaries (24.71G) exceeds available HBM \
(15.75G). HLO module: jit_train.
See the documentation of the error for more details."""
LONG = """\
RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in \
memory space hbm. Used 63.80G of 30.75G hbm. Exceeded hbm capacity by 33.05G.

Total hbm usage >= 65.05G:
    reserved          1.25G
    program          63.80G
    arguments            0B

  Largest program allocations in hbm:

  1. Size: 2.00G
     Operator: op_name="jit(train)/gradient/dot_general" source_line=1059
     Shape: f32[32,4096,4096]{1,2,0:T(8,128)}
     Unpadded size: 2.00G
     Allocation type: HLO temp
     ==========================

  2. Size: 512.00M
     Shape: bf16[32,4096,2048]{2,1,0:T(8,128)}
     Allocation type: HLO temp
     ==========================
"""


def test_what_the_compiler_says_of_too_large_a_program():
  found = compiling.read_overflow("train", SHORT)
  assert found.used == pytest.approx(24.71 * GIB)
  assert found.available == 15.75 * GIB
  assert not found.largest
  found = compiling.read_overflow("train", LONG)
  assert found.used == pytest.approx(63.80 * GIB)
  assert found.available == 30.75 * GIB
  (first, what), (second, other) = found.largest
  assert (first, second) == (2 * GIB, GIB // 2)
  assert "f32[32,4096,4096]" in what
  assert "jit(train)/gradient/dot_general" in what
  assert "bf16[32,4096,2048]" in other
  assert "dot_general" not in other


BUFFERS = """\
BufferAssignment:
allocation 0: size 1048576, page 0, output shape is |f32[256,1024]|:
 value: <28 fusion @0> (size=1048576,offset=0): f32[256,1024]{1,0:T(8,128)}
allocation 2: size 115200, page 0, preallocated-temp:
 value: <15 fusion.7 @0> (size=4096,offset=0): f32[8,128]{1,0:T(8,128)}
 value: <16 copy.1 @0> (size=4096,offset=0): f32[8,128]{1,0:T(8,128)}
 value: <18 slice-start.1{0} @0> (size=512,offset=8192): (f32[256,1024]{1,0})
allocation 3: size 3670016, color 1, page 0, preallocated-temp:
 value: <8 slice.1 @1> (size=262144,offset=2097152): f32[64,1024]{1,0}
"""
TEXT = """\
  %fusion.7 = f32[8,128] fusion(%p), metadata={op_name="jit(train)/a/mul"}
"""


def test_temporaries_are_named():
  """Once per place, without arguments and on-chip memory."""
  (first, what), (second, _) = compiling.largest(BUFFERS, TEXT)
  assert (first, second) == (4096, 512)
  assert what == "f32[8,128] a/mul"


def compiled(step, size):
  """What a compiler might say."""
  account = compiling.Account(
    name="train",
    arguments=size,
    temporaries=0,
    results=0,
    code=0,
    text=None,
    largest=(),
  )
  return compiling.Compiled(
    step=step, accounts=(account,), overflow=None, seconds=0.0
  )


@compiles
def test_compiled_for_a_slice(run, capfd):
  """The account of the compiler itself, and its program's loops."""
  file = run / "compiled.json"
  assert plan(run, f"--json={file}") == 0
  out, err = capfd.readouterr()
  assert err == "compiling the step for v5e:2x2\n"
  assert "no weights are gathered in the decode loop" in out
  figures = json.loads(file.read_text())
  assert figures["fits"]
  assert 0 < figures["used"] < 0.5
  program = figures["programs"]["train"]
  resident = figures["estimate"]["resident_bytes"]
  # Beside weights and moments there are ids, and the padding of tiles.
  assert resident <= program["argument_bytes"] < 1.2 * resident
  speed = figures["speed"]
  assert speed["compiled"]
  assert speed["decode"]["weight_gathers"] == []
  kinds = {one["kind"] for one in speed["collectives"]}
  assert kinds & {"all-gather", "all-reduce", "reduce-scatter"}


@compiles
def test_what_does_not_fit_is_mended(run, capfd, monkeypatch):
  """The compiler refuses it; it has its say on changes in a fake.

  To compile one that just fits takes minutes.
  """
  compile_for, changed = fit.compile_for, []

  def compile_first(blueprint, where):
    if not changed:
      changed.append(blueprint.config)
      return compile_for(blueprint, where)
    changed.append(blueprint.config)
    return compiled(None, GIB)

  monkeypatch.setattr(fit, "compile_for", compile_first)
  monkeypatch.setattr(remedies, "WANTED", 1)
  file = run / "mended.json"
  # 81,920 rows a device have a cache of 10 GiB, on any mesh of 4 devices, and
  # the same again before it is copied.
  too_large = (
    "--config.batch.prompts=163840",
    "--config.batch.micro_batches=160",
  )
  assert plan(run, *too_large, f"--json={file}") == 1
  out, err = capfd.readouterr()
  assert "does NOT fit: program train needs" in out
  assert "of 15.8 GiB, says the compiler" in out
  figures = json.loads(file.read_text())
  assert figures["overflow"]["used"] > figures["memory_bytes"]
  assert not figures["fits"]
  (remedy,) = figures["remedies"]
  assert remedy["fits"]
  assert remedy["overrides"] == ["batch.prompts=81920"]
  assert remedy["alters"] == "half of batch.prompts"
  assert "--config.batch.prompts=81920  (half of batch.prompts)" in out
  assert [one.batch.prompts for one in changed] == [163840, 81920]
  assert err.splitlines() == [
    "compiling the step for v5e:2x2",
    "looking for changes with which it fits",
    "compiling --config.batch.prompts=81920 for v5e:2x2",
  ]


def test_changes_are_ranked_and_tried_in_order(run):
  """Single ones that compute the same first; never what does not divide."""
  location = str(run / "run.py")
  space = types.SimpleNamespace

  def load(more):
    return parsing.load(RunConfig, location, more)

  def count(config):
    """12 GiB and what is kept of the rows of a micro-batch."""
    batch, mesh = config.batch, config.mesh.sizes
    if batch.micro_batches > 8:
      raise InputError("rows of a micro-batch")
    rows = batch.prompts / batch.micro_batches / 64
    kept = 2 if config.student.remat == "full" else 8
    held = 1 if config.teacher.weight_dtype == "int8" else 2
    return space(
      blueprint=space(config=config),
      memory=16 * GIB,
      estimate=space(total=int((10 + held + kept * rows) * GIB)),
      step=space(
        scorer=space(student=space(layout=space(mesh=space(shape=mesh))))
      ),
    )

  counted, tried = count(load(())), []

  def compile_(changed, change):
    tried.append(change)
    return compiled(None, 0 if len(tried) % 2 else 2 * changed.memory)

  needed = counted.estimate.total
  found = remedies.find(load, counted, needed, count, compile_)
  assert [one.fits for one in found] == [True, False, True, False, True]
  assert [one.overrides for one in tried[:3]] == [
    ("batch.micro_batches=8",),
    ("student.remat=full",),
    ("batch.prompts=32",),
  ]
  kinds = [(len(one.keys), bool(one.alters)) for one in tried]
  assert kinds == sorted(kinds)
  assert len({one.keys for one in tried}) == len(tried)
  # Without a compiler the first of them stand as counted.
  only = remedies.count_only(load, counted, count)
  assert [one.change for one in only] == tried[: remedies.WANTED]
  assert all(one.total == one.counted <= counted.memory for one in only)


def test_meshes_cover_the_same_devices(run):
  config = parsing.load(RunConfig, str(run / "run.py"))
  where = topology.parse("v5e-4")
  counted = fit.count(config, where, published.architecture)
  meshes = [
    change.overrides
    for change in remedies.changes(config, counted)
    if change.keys == {"mesh"}
  ]
  assert ("mesh.fsdp=4", "mesh.tensor=1") in meshes
  assert ("mesh.fsdp=1", "mesh.context=2") in meshes
  sizes = {**config.mesh.sizes}
  for overrides in meshes:
    changed = dict(one.removeprefix("mesh.").split("=") for one in overrides)
    total = math.prod(
      {**sizes, **{k: int(v) for k, v in changed.items()}}.values()
    )
    assert total == where.devices


def test_sizes_for_people():
  assert memory.size_text(3 * GIB // 2) == "1.5 GiB"
