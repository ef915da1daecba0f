"""Checkpoints: what is kept, what comes back, what is refused."""

import copy
import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opd_jax import checkpoint, sharding, types
from opd_jax.checkpoint import Checkpoints
from opd_jax.config import CheckpointConfig, RunConfig
from opd_jax.errors import InputError
from opd_jax.parsing import parse

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
AXES = {"w": ("embed", "ffw"), "norm": {"scale": ("norm",)}}


def make_state(step=0, **sizes):
  """A state on a mesh of all devices, of random bits that depend on the step.

  What is random cannot be compressed, so that in a file any bit is as good.
  """
  mesh = sharding.make_mesh(sizes or {"fsdp": -1})
  layout = sharding.Layout.create(mesh, sharding.TRAIN_RULES)
  random = np.random.default_rng(step)
  params = {"w": jnp.zeros((64, 256)), "norm": {"scale": jnp.zeros(3)}}
  params = jax.device_put(params, layout.tree_shardings(AXES, params))
  optimizer = OPTIMIZER.init(params)

  def fill(leaf):
    place = leaf.sharding if leaf.ndim else layout.replicated()
    values = np.frombuffer(random.bytes(leaf.nbytes), leaf.dtype)
    return jax.device_put(values.reshape(leaf.shape), place)

  return types.TrainState(
    step=fill(jnp.int32(0)),
    params=jax.tree.map(fill, params),
    optimizer=jax.tree.map(fill, optimizer),
    objective={},
  )


def abstract(state):
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=leaf.sharding
    ),
    state,
  )


@pytest.fixture
def opened(tmp_path):
  """Opens the test's folder of checkpoints, and closes it in the end."""
  all_opened = []

  def open_checkpoints(config=CheckpointConfig(), folder="checkpoints"):  # noqa: B008
    all_opened.append(Checkpoints(tmp_path / folder, config))
    return all_opened[-1]

  yield open_checkpoints
  for checkpoints in all_opened:
    checkpoints.close()


@pytest.fixture
def damaged(opened, tmp_path):
  """Steps 3 and 6, closed, ready to be damaged; gives the folder of step 6."""
  checkpoints = opened()
  for step in (3, 6):
    checkpoints.save(step, make_state(step), {})
  checkpoints.wait()
  return tmp_path / "checkpoints" / "6"


def test_restores_onto_another_mesh_with_the_same_types(opened):
  saved = make_state(4, fsdp=8)
  checkpoints = opened()
  checkpoints.save(
    4, saved, {"order": {"next_index": 7}}, {"held_out/loss": 1.0}
  )
  checkpoints.wait()
  target = make_state(0, replica=2, fsdp=2, tensor=2)
  state, data_state = opened().restore(None, abstract(target))
  assert data_state == {"order": {"next_index": 7}}
  assert jax.tree.structure(state) == jax.tree.structure(target)
  for before, after, place in zip(
    *map(jax.tree.leaves, (saved, state, target)), strict=True
  ):
    np.testing.assert_array_equal(before, after)
    assert after.dtype == before.dtype
    assert after.sharding == place.sharding


def test_state_may_be_donated_while_it_is_written(opened):
  state = make_state(2)
  expected = jax.device_get(state.params)
  overwrite = jax.jit(
    lambda tree: jax.tree.map(lambda leaf: leaf * 0 - 1, tree), donate_argnums=0
  )
  checkpoints = opened()
  target = abstract(state)
  checkpoints.save(2, state, {})
  jax.block_until_ready(overwrite(state))
  checkpoints.wait()
  restored, _ = checkpoints.restore(2, target)
  jax.tree.map(np.testing.assert_array_equal, restored.params, expected)


def test_keeps_the_newest_and_the_best(opened):
  checkpoints = opened(CheckpointConfig(keep_latest=2))
  state = make_state()
  losses = {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: float("nan"), 6: None}
  for step, loss in losses.items():
    metrics = (
      None if loss is None else {"held_out/loss": loss, "train/loss": 0.0}
    )
    checkpoints.save(step, state, {}, metrics)
  checkpoints.wait()
  again = opened(CheckpointConfig(keep_latest=2))
  for view in (checkpoints, again, opened(None)):
    assert (view.latest(), view.best()) == (6, 2)
    with pytest.raises(InputError, match=r"of step 4 .* there: 2, 5, 6$"):
      view.restore(4, abstract(state))
  again.save(7, state, {}, {"held_out/loss": 0.5})
  again.wait()
  again.save(7, state, {}, {"held_out/loss": 9.0})  # There already: left alone.
  assert (again.latest(), again.best()) == (7, 7)


def test_the_best_is_by_accuracy_where_there_is_one(opened):
  """Of equal accuracies the newest; a loss alone is below any accuracy."""
  checkpoints = opened(CheckpointConfig(keep_latest=1))
  measured = {
    1: {"eval/accuracy": 0.5, "held_out/loss": 0.1},
    2: {"eval/accuracy": 0.7, "held_out/loss": 3.0},
    3: {"eval/accuracy": 0.7, "held_out/loss": 4.0},
    4: {"held_out/loss": 0.01},
    5: {"eval/accuracy": 0.6, "held_out/loss": 0.01},
  }
  for step, metrics in measured.items():
    checkpoints.save(step, make_state(), {}, metrics)
  checkpoints.wait()
  assert (checkpoints.latest(), checkpoints.best()) == (5, 3)
  with pytest.raises(InputError, match=r"of step 2 .* there: 3, 5$"):
    checkpoints.restore(2, abstract(make_state()))


def test_without_keep_best_only_the_newest_stay(opened, tmp_path):
  checkpoints = opened(CheckpointConfig(keep_latest=1, keep_best=False))
  for step, loss in ((1, 0.1), (2, 2.0)):
    checkpoints.save(step, make_state(), {}, {"held_out/loss": loss})
  checkpoints.wait()
  assert (checkpoints.latest(), checkpoints.best()) == (2, 2)


def test_an_empty_folder_has_nothing(opened):
  checkpoints = opened()
  assert (checkpoints.latest(), checkpoints.best()) == (None, None)
  with pytest.raises(InputError, match=r"no checkpoint in .* there: none"):
    checkpoints.restore(None, abstract(make_state()))
  with pytest.raises(InputError, match=r"there is no folder .*nowhere"):
    opened(None, "nowhere")


def test_half_written_checkpoints_are_ignored(damaged, opened):
  partial = damaged.with_name("9.orbax-checkpoint-tmp")
  shutil.copytree(damaged / "state", partial / "state")
  (partial / "state" / "manifest.ocdbt").unlink()
  reader = opened(None)
  assert reader.latest() == 6
  assert partial.exists()  # It may be a running job's.
  writer = opened()
  assert writer.latest() == 6
  writer.save(9, make_state(9), {})
  writer.wait()
  assert writer.latest() == 9
  assert not partial.exists()
  writer.restore(9, abstract(make_state()))


def flip_a_byte_of_the_largest_file(folder):
  path = max(
    filter(pathlib.Path.is_file, folder.rglob("*")),
    key=lambda file: file.stat().st_size,
  )
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 0x10
  path.write_bytes(content)


@pytest.mark.parametrize(
  "damage",
  [
    flip_a_byte_of_the_largest_file,
    lambda folder: (folder / "data" / "metadata").write_text(""),
    lambda folder: (folder / "state" / "_METADATA").write_text("{"),
    lambda folder: (folder / "state" / "manifest.ocdbt").unlink(),
    lambda folder: shutil.rmtree(folder / "state" / "ocdbt.process_0"),
    lambda folder: shutil.rmtree(folder / "state"),
    lambda folder: shutil.rmtree(folder / "arrays"),
  ],
)
def test_damage_is_found_and_the_way_back_is_told(damage, damaged, opened):
  damage(damaged)
  checkpoints = opened()
  with pytest.raises(
    InputError, match=r"(?s)step 6 .*Delete the folder .*6 .* there are: 3$"
  ):
    checkpoints.restore(None, abstract(make_state()))
  state, _ = checkpoints.restore(3, abstract(make_state()))
  np.testing.assert_array_equal(state.params["w"], make_state(3).params["w"])


def test_bits_of_every_array_are_compared(damaged, opened):
  """One bit of one sum is enough."""
  path = damaged / "arrays" / "metadata"
  arrays = json.loads(path.read_text())
  arrays["params.norm.scale"][1] ^= 1
  path.write_text(json.dumps(arrays))
  with pytest.raises(InputError, match=r"bits of params\.norm\.scale changed"):
    opened().restore(6, abstract(make_state()))


def test_a_state_of_another_form_is_refused(damaged, opened):
  target = abstract(make_state())
  w = target.params["w"]
  params = {
    "w": jax.ShapeDtypeStruct((64, 64), jnp.bfloat16, sharding=w.sharding),
    "bias": w,
    "norm": target.params["norm"],
  }
  with pytest.raises(
    InputError,
    match=r"another model or optimizer: params\.bias: absent saved, "
    r"float32\[64, 256\] wanted; params\.w: float32\[64, 256\] saved, "
    r"bfloat16\[64, 64\] wanted\. Use",
  ):
    opened().restore(6, dataclasses.replace(target, params=params))


RUN = {
  "student": {"path": "a", "remat": "none"},
  "teacher": {"path": "c"},
  "data": {"sources": {"texts": {"path": "texts.jsonl"}}},
  "objective": {"name": "opd_k1"},
  "batch": {"prompts": 4, "micro_batches": 1},
  "sampling": {"stop_ids": (1, 2)},
  "steps": 10,
  "mesh": {"fsdp": -1},
  "seed": 0,
}


def changed(**values):
  run = copy.deepcopy(RUN)
  for name, value in values.items():
    group, _, key = name.partition("__")
    run[group] = run.get(group, {}) | {key: value} if key else value
  return parse(RunConfig, run)


def test_manifest_refuses_another_run_only(opened, tmp_path):
  checkpoints = opened()
  checkpoints.save_manifest("train", changed(seed=1))
  checkpoints.save_manifest(
    "train", changed()
  )  # Nothing is saved yet: no harm in changes.
  checkpoints.save(1, make_state(), {})
  checkpoints.wait()
  allowed = changed(
    steps=20, mesh__fsdp=2, batch__micro_batches=2, student__remat="full"
  )
  opened().save_manifest("train", allowed)
  manifest = json.loads((tmp_path / "checkpoints/manifest.json").read_text())
  assert manifest["config"]["steps"] == 20
  assert manifest["versions"]["jax"] == jax.__version__
  with pytest.raises(
    InputError,
    match=r"batch\.prompts: 4 saved, 8 given; objective\.beta: 'absent' saved, "
    r"0\.5 given; student\.path: 'a' saved, 'b' given\. Give",
  ):
    opened().save_manifest(
      "train", changed(batch__prompts=8, objective__beta=0.5, student__path="b")
    )
  with pytest.raises(InputError, match="of opd-jax train, not of sft; use"):
    opened().save_manifest("sft", changed())


def test_keys_that_were_not_there_count_as_their_defaults(opened, tmp_path):
  """Whole groups, keys of a group and keys of each source."""
  checkpoints = opened()
  checkpoints.save_manifest("train", changed())
  checkpoints.save(1, make_state(), {})
  checkpoints.wait()
  path = tmp_path / "checkpoints" / "manifest.json"
  manifest = json.loads(path.read_text())
  del manifest["config"]["rollout"]
  del manifest["config"]["batch"]["epochs"]
  del manifest["config"]["data"]["sources"]["texts"]["given"]
  older = json.dumps(manifest)
  path.write_text(older)
  opened().save_manifest("train", changed())
  path.write_text(older)
  with pytest.raises(
    InputError,
    match=r"another run; batch\.epochs: 1 saved, 2 given; "
    r"rollout\.prefix: 'none' saved, 'cosine' given\. Give",
  ):
    opened().save_manifest(
      "train", changed(batch__epochs=2, rollout__prefix="cosine")
    )


def test_the_held_out_loss_of_a_replay_is_part_of_the_run(opened):
  checkpoints = opened()
  plain = {"held_out__path": "texts.jsonl"}
  replay = {**plain, "rollout__replay_capacity": 8}
  checkpoints.save(1, make_state(), {})
  checkpoints.wait()
  for keys, key in ((plain, None), (replay, "every"), (replay, "batch")):
    (checkpoints._directory / "manifest.json").unlink(missing_ok=True)
    checkpoints.save_manifest("train", changed(**keys))
    other = changed(**keys, **{f"held_out__{key or 'every'}": 3})
    if key is None:
      opened().save_manifest("train", other)
      continue
    with pytest.raises(InputError, match=rf"held_out\.{key}: \d+ saved, 3 "):
      opened().save_manifest("train", other)


def test_a_checkpoint_of_an_earlier_version_is_restored(
  opened, monkeypatch, tmp_path
):
  """It has no part of the state that came later; neither do all have arrays."""
  whole = checkpoint._to_dict
  with monkeypatch.context() as patch:
    patch.setattr(
      checkpoint,
      "_to_dict",
      lambda state: {k: v for k, v in whole(state).items() if k != "replay"},
    )
    writer = opened()
    writer.save(3, make_state(3), {})
    writer.wait()
  state, _ = opened(None).restore(None, abstract(make_state()))
  np.testing.assert_array_equal(state.params["w"], make_state(3).params["w"])
  assert state.objective == state.replay == {}
  target = dataclasses.replace(
    abstract(make_state()), replay={"next": abstract(make_state()).step}
  )
  with pytest.raises(InputError, match=r"replay\.next: absent saved, int32"):
    opened(None).restore(None, target)
