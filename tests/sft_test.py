"""Supervised fine-tuning: the packed step, and whole runs."""

import dataclasses
import functools
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opd_jax import cli, sft
from opd_jax.config import SftConfig
from opd_jax.errors import InputError
from opd_jax.models import Model, hf
from opd_jax.parsing import parse
from opd_jax.run_export import export_run
from opd_jax.scoring import Scorer
from opd_jax.sft import SftStep, scoring_batch
from opd_jax.sharding import TRAIN_RULES, Layout, make_mesh
from opd_jax.types import PackedRows, Packing
from tests import engine, pair

# --- The step ---

# Lengths of prompt and completion, by row: rows of 16 slots.
EXAMPLES = (
  ((3, 4), (1, 5), (2, 1)),
  ((8, 8),),
  ((1, 1), (1, 1), (5, 4)),
  ((0, 6), (4, 2)),
)
SLOTS = 16


def _rows(rows, slots):
  """Rows that hold (prompt length, ids) each."""
  tokens = np.zeros((len(rows), slots), np.int32)
  positions = np.full((len(rows), slots), -1, np.int32)
  segments = np.full((len(rows), slots), -1, np.int32)
  learned = np.zeros((len(rows), slots), bool)
  for row, examples in enumerate(rows):
    start = 0
    for segment, (prompt, ids) in enumerate(examples):
      here = slice(start, start + len(ids))
      tokens[row, here] = ids
      positions[row, here] = np.arange(len(ids))
      segments[row, here] = segment
      learned[row, start + max(prompt, 1) : here.stop] = True
      start = here.stop
  return PackedRows(
    tokens=jnp.asarray(tokens),
    packing=Packing(
      positions=jnp.asarray(positions), segments=jnp.asarray(segments)
    ),
    learned=jnp.asarray(learned),
  )


def _examples():
  random = np.random.default_rng(0)
  return [
    [
      (prompt, random.integers(0, engine.STUDENT.vocab_size, prompt + length))
      for prompt, length in row
    ]
    for row in EXAMPLES
  ]


def _packed():
  return _rows(_examples(), SLOTS)


def _one_per_row():
  return _rows([[one] for row in _examples() for one in row], SLOTS)


def _step(*, mesh=None, devices=1, micro_batches=1, chunk_tokens=16):
  layout = Layout.create(
    make_mesh(mesh or {}, jax.devices()[:devices]), TRAIN_RULES
  )
  return SftStep(
    scorer=Scorer(
      student=Model(engine.STUDENT, layout),
      vocab_size=engine.STUDENT.vocab_size,
      chunk_tokens=chunk_tokens,
    ),
    objective=sft.OBJECTIVE,
    optimizer=optax.sgd(0.1),
    learning_rate=optax.constant_schedule(0.1),
    micro_batches=micro_batches,
    steps=10,
    seed=0,
  )


def _state(step):
  params = jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf if path[-1].key == "scale" else 5.0 * leaf,
    step.scorer.student.init(jax.random.key(0)),
  )
  return step.place_state(params)


@functools.cache
def _evaluation(packed=True, **changes):
  step = _step(**changes)
  rows = _packed() if packed else _one_per_row()
  evaluation = jax.jit(step.gradient)(_state(step), {}, scoring_batch(rows))
  return evaluation.losses["nll"], evaluation.gradients


def _assert_close(left, right, atol=1e-6):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol),
    left,
    right,
  )


def test_packed_rows_equal_one_example_a_row():
  _assert_close(_evaluation(), _evaluation(packed=False))


def test_packed_rows_equal_plain_autodiff_of_causal_rows():
  """One example a row without segments and empty slots; all logits at once."""
  step = _step()
  model, state = step.scorer.student, _state(step)
  rows = _one_per_row()
  positions = jnp.broadcast_to(jnp.arange(SLOTS), rows.tokens.shape)

  def loss(params):
    hidden = model.hidden(params, rows.tokens, positions)
    logits = model.logits(params, hidden)[..., : engine.STUDENT.vocab_size]
    picked = jnp.take_along_axis(
      jax.nn.log_softmax(logits)[:, :-1], rows.tokens[:, 1:, None], axis=2
    )[..., 0]
    return -jnp.mean(picked, where=rows.learned[:, 1:])

  expected = jax.jit(jax.value_and_grad(loss))(state.params)
  _assert_close(_evaluation(), expected)
  assert max(jnp.max(jnp.abs(x)) for x in jax.tree.leaves(expected[1])) > 0.05


@pytest.mark.parametrize(
  "changes",
  [
    {"micro_batches": 2},
    {"chunk_tokens": 1},
    {"chunk_tokens": 10**6},
    {
      "mesh": {"replica": 2, "fsdp": 2, "tensor": 2},
      "devices": 8,
    },
    {
      "mesh": {"fsdp": 2, "tensor": 2, "context": 2},
      "devices": 8,
      "micro_batches": 2,
    },
  ],
  ids=str,
)
def test_how_the_batch_is_cut_or_spread_changes_nothing(changes):
  step = _step(**changes)
  evaluation = jax.jit(step.gradient)(
    _state(step), {}, scoring_batch(_packed())
  )
  found = evaluation.losses["nll"], jax.device_get(evaluation.gradients)
  _assert_close(found, jax.device_get(_evaluation()))


def test_an_example_does_not_depend_on_its_neighbours():
  """Other ids and other lengths beside it, and no bit of its states moves."""
  step = _step()
  params = _state(step).params
  random = np.random.default_rng(1)
  one = random.integers(0, 61, 6)
  rows = [
    [(2, one), (1, random.integers(0, 61, 5))],
    [(2, one), (3, random.integers(0, 61, 9))],
  ]
  batch = scoring_batch(_rows(rows, SLOTS))
  states = jax.jit(
    lambda params, batch: step.scorer.hidden("student", params, batch)
  )(params, batch)
  np.testing.assert_array_equal(states[0, 1:5], states[1, 1:5])
  assert np.any(np.asarray(states[0, 1:5]) != 0)


def test_metrics_count_what_is_in_the_rows():
  step = _step()
  _, metrics = jax.jit(step.train)(_state(step), {}, _packed())
  sizes = [size for row in EXAMPLES for size in row]
  tokens = sum(sum(size) for size in sizes)
  assert float(metrics["packing/tokens"]) == tokens
  assert float(metrics["packing/used"]) == pytest.approx(tokens / (4 * SLOTS))
  assert float(metrics["packing/examples"]) == len(sizes)
  learned = sum(length - (prompt == 0) for prompt, length in sizes)
  assert float(metrics["packing/learned"]) == learned
  context = sum(sum(range(sum(size))) for size in sizes) / tokens
  assert float(metrics["packing/context_mean"]) == pytest.approx(context)
  # On given tokens nothing is compared with a sampler.
  assert not any(name.startswith("mismatch") for name in metrics)


# --- Runs ---

TIMED = ("time/", "train/tokens_per_second", "train/tflops_per_device")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("pair")
  return pair.write_examples(pair.write_pair(folder))


def _config(folder, **changes):
  return parse(SftConfig, pair.sft_config_of(folder, **changes))


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  monkeypatch.setattr(
    sft, "make_mesh", lambda sizes: make_mesh({}, jax.devices()[:1])
  )


@pytest.fixture(scope="module")
def uninterrupted(folder, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("uninterrupted")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      sft, "make_mesh", lambda sizes: make_mesh({}, jax.devices()[:1])
    )
    return sft.sft(_config(folder), workdir), workdir


def _records(workdir, name="metrics.jsonl"):
  return [
    {
      key: value
      for key, value in json.loads(line).items()
      if not key.startswith(TIMED)
    }
    for line in (workdir / name).read_text().splitlines()
  ]


def _terminate_after(monkeypatch, steps):
  """SIGTERM arrives while step number `steps` runs."""
  run = sft.FineTuning.step
  calls = []

  def counted(self, *arguments):
    calls.append(None)
    if len(calls) == steps:
      os.kill(os.getpid(), signal.SIGTERM)
    return run(self, *arguments)

  monkeypatch.setattr(sft.FineTuning, "step", counted)


def test_a_run_leaves_what_it_promises(uninterrupted, folder):
  summary, workdir = uninterrupted
  assert summary.finished
  assert summary.step == 8
  written = json.loads((workdir / "summary.json").read_text())
  assert written == summary.to_json()
  steps = [record for record in _records(workdir) if "train/loss" in record]
  assert [record["step"] for record in steps] == list(range(1, 9))
  assert steps[-1]["train/loss"] < steps[0]["train/loss"]
  assert {
    "loss/nll",
    "student/entropy",
    "packing/used",
    "optimizer/grad_norm",
    "optimizer/learning_rate",
  } <= steps[0].keys()
  samples = _records(workdir, "samples.jsonl")
  assert samples[0].keys() == {"step", "prompt", "completion", "length"}
  assert samples[0]["prompt"].startswith("<s>")
  assert samples[0]["completion"].endswith("</s>")
  manifest = json.loads((workdir / "checkpoints/manifest.json").read_text())
  assert manifest["kind"] == "sft"
  for name in ("tokenizer.json", "generation_config.json"):
    source = folder / "student" / name
    assert (workdir / "export" / name).read_bytes() == source.read_bytes()


@pytest.mark.parametrize("stop_after", [2, 4])
def test_resume_equals_uninterrupted_bit_for_bit(
  folder, uninterrupted, monkeypatch, tmp_path, stop_after
):
  with monkeypatch.context() as patch:
    _terminate_after(patch, stop_after)
    stopped = sft.sft(_config(folder), tmp_path)
  assert not stopped.finished
  assert stopped.step == stop_after
  assert stopped.export is None
  resumed = sft.sft(_config(folder), tmp_path)
  whole, workdir = uninterrupted
  assert resumed.finished
  assert (resumed.before, resumed.after) == (whole.before, whole.after)
  assert _records(tmp_path) == _records(workdir)
  for name in ("samples.jsonl", "export/model.safetensors"):
    assert (tmp_path / name).read_bytes() == (workdir / name).read_bytes()


def test_export_and_generate_work_on_the_result(uninterrupted, tmp_path):
  _, workdir = uninterrupted
  assert export_run(workdir, tmp_path / "last") == 8
  name = "model.safetensors"
  assert (tmp_path / "last" / name).read_bytes() == (
    workdir / "export" / name
  ).read_bytes()
  out = tmp_path / "out.json"
  arguments = ["--prompt=aa", "--max_new_tokens=4", f"--json={out}"]
  assert (
    cli.main(["generate", f"--model={workdir / 'export'}", *arguments]) == 0
  )
  (found,) = json.loads(out.read_text())
  assert len(found["tokens"]) > 0


def test_random_weights_need_no_weights_file(folder, tmp_path):
  """The seed makes them; nothing but config and tokenizer is there."""
  source = tmp_path / "empty"
  source.mkdir()
  for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
    (source / name).write_bytes((folder / "student" / name).read_bytes())
  student = {"path": str(source), "init": "random"}
  files = {}
  for name, seed in (("a", 0), ("b", 0), ("c", 1)):
    config = _config(folder, student=student, steps=1, held_out={}, seed=seed)
    summary = sft.sft(config, tmp_path / name)
    assert summary.before == {}
    files[name] = (tmp_path / name / "export/model.safetensors").read_bytes()
  assert files["a"] == files["b"] != files["c"]
  hf.check(tmp_path / "a" / "export", hf.read_config(source))
  with pytest.raises(InputError, match="holds neither"):
    sft.prepare(_config(folder, student={"path": str(source)}))


def test_a_warm_start_begins_with_the_weights_of_the_checkpoint(
  folder, uninterrupted
):
  setup = sft.prepare(_config(folder))
  task = sft.FineTuning(setup, sft.make_step(setup))
  expected = hf.load(folder / "student", task.student)
  jax.tree.map(
    np.testing.assert_array_equal, task.initial_state().params, expected
  )


def _write_config(tmp_path, config):
  values = dataclasses.asdict(config)
  path = tmp_path / "config.py"
  path.write_text(f"def get_config():\n  return {values!r}\n")
  return path


def test_sigterm_ends_the_command_with_143(
  folder, monkeypatch, tmp_path, capfd
):
  config = _write_config(tmp_path, _config(folder, held_out={}))
  arguments = ["sft", f"--config={config}", f"--workdir={tmp_path / 'run'}"]
  with monkeypatch.context() as patch:
    _terminate_after(patch, 2)
    assert cli.main(arguments) == 143
  assert "stopped after step 2 of 8" in capfd.readouterr().err
  assert cli.main(arguments) == 0
  told = capfd.readouterr()
  assert "resuming after step 2" in told.err
  assert "Hugging Face checkpoint:" in told.out


@pytest.mark.parametrize(
  ("changes", "parts"),
  [
    (
      {"batch": {"rows": 3, "micro_batches": 2}},
      ["batch.micro_batches=2", "batch.rows=3"],
    ),
    (
      {"batch": {"rows": 2, "row_tokens": 4}},
      ["data.sources.letters", "batch.row_tokens = 4", "raise"],
    ),
    ({"data": {"sources": {}}}, ["data.sources must name"]),
    ({"student": {"path": "nowhere"}}, ["'nowhere'", "give a folder"]),
    (
      {"student": {"path": "x", "init": "zeros"}},
      ["student.init", "'random'", "'zeros'"],
    ),
    ({"data": {"sources": {}, "overlong": "drop"}}, ["data.overlong"]),
  ],
  ids=str,
)
def test_mistakes_are_told_before_any_device_work(folder, changes, parts):
  with pytest.raises(InputError) as caught:
    sft.prepare(_config(folder, **changes))
  for part in parts:
    assert part in str(caught.value)


def test_an_example_beyond_the_window_is_refused(folder, tmp_path):
  path = tmp_path / "long.jsonl"
  path.write_text(json.dumps({"text": "a" * 70}) + "\n")
  sources = {"long": {"path": str(path), "completion": "b"}}
  changes = {"batch": {"rows": 2, "row_tokens": 128}}
  with pytest.raises(InputError, match=r"73 tokens.*window of 64.*row_tokens"):
    sft.prepare(_config(folder, data={"sources": sources}, **changes))


def test_learned_evaluation_rows_stop_a_run(folder, tmp_path, capfd):
  """Before it begins; and it goes on where they are allowed."""
  source = {
    "path": str(folder / "examples.jsonl"),
    "rows": 2,
    "prompt": {"text": "Q: {question}"},
  }
  changes = {
    "eval": {
      "source": source,
      "verifier": "exact",
      "samples": 1,
      "sampling": {"max_new_tokens": 2},
    },
    "held_out": {},
    "steps": 1,
  }
  with pytest.raises(
    InputError,
    match=r"eval_rows_in_training: 2 of 2 rows of eval\.source.*"
    r"examples\.jsonl, line 1.*preflight\.allow",
  ):
    sft.sft(_config(folder, **changes), tmp_path / "run")
  assert not (tmp_path / "run").exists()
  allow = {"allow": ("eval_rows_in_training",)}
  config = _config(folder, **changes, preflight=allow)
  assert sft.sft(config, tmp_path / "run").finished
  assert (
    "error eval_rows_in_training (allowed): 2 of 2" in capfd.readouterr()[1]
  )


def test_the_mesh_must_divide_the_rows(folder):
  setup = sft.prepare(_config(folder))
  mesh = make_mesh({"fsdp": 4}, jax.devices()[:4])
  with pytest.raises(InputError, match=r"2 \(batch\.rows = 2\).*the 4 shards"):
    sft.make_step(setup, mesh)
