"""Saves and restores what a run is made of.

The only importer of orbax. A checkpoint holds arrays as plain dicts and JSON,
nothing pickled; it is restored to the shardings of a target, so another mesh is
no special case. orbax does not notice a changed byte inside an array, and ends
untidily where a file is cut short: so the sizes of the files and, for every
array, its type, shape and a sum over its bits are saved too, and compared.
"""

import dataclasses
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import Array, UInt32

from opd_jax import manifest, storage
from opd_jax.config import CheckpointConfig, RunConfig, SftConfig
from opd_jax.errors import InputError
from opd_jax.manifest import Manifest
from opd_jax.types import TrainState

# What makes a checkpoint the best: the accuracy of the evaluation if there is
# one, or else the held-out loss.
ACCURACY = "eval/accuracy"
LOSS = "held_out/loss"

_SIZES = "sizes.json"
_MANIFEST = "manifest.json"


class Checkpoints:
  """The checkpoints of one run: the newest few and the best.

  All processes call every method. Half-written checkpoints are never seen.
  """

  def __init__(
    self, directory: str | storage.AnyPath, config: CheckpointConfig | None
  ):
    """Opens a folder of checkpoints.

    Args:
      directory: local folder, or a bucket such as "gs://...".
      config: what is kept. The folder is created if need be, and what a killed
        run left half-written is removed. None opens it for reading, which is
        safe while a run writes there.

    Raises:
      InputError: nothing to read there.
    """
    folder = epath.Path(storage.to_path(directory))
    # Of a bucket `resolve` would make a local path.
    remote = storage.is_remote(folder)
    self._directory = folder if remote else folder.resolve()
    self._saving: int | None = None
    if config is None:
      if not self._directory.is_dir():
        raise InputError(
          f"no checkpoints: there is no folder {self._directory}; give the "
          "workdir of a run that has saved one"
        )
      options = ocp.CheckpointManagerOptions(
        best_fn=_score, best_mode="max", create=False
      )
    else:
      options = ocp.CheckpointManagerOptions(
        async_options=ocp.AsyncOptions(
          post_finalization_callback=self._write_sizes
        ),
        preservation_policy=_preservation(config),
        best_fn=_score,
        best_mode="max",
        cleanup_tmp_directories=True,
      )
    self._manager = ocp.CheckpointManager(self._directory, options=options)

  def save_manifest(self, kind: str, config: RunConfig | SftConfig) -> None:
    """Records what run this is; call it at the start, before `restore`.

    Args:
      kind: of run: the command that makes it, "train" or "sft".
      config: of the run. A key that a saved config lacks, since there was no
        such key then, counts there as its default.

    Raises:
      InputError: there are checkpoints of a run whose config differs in a key
        that changes what is computed or measured. Steps, mesh, log and
        checkpoint settings and what only trades memory for time may differ.
    """
    file = self._directory / _MANIFEST
    if self.latest() is not None and file.exists():
      manifest.check(manifest.read(file), kind, config, str(self._directory))
    if jax.process_index() == 0:
      manifest.write(file, kind, config)

  def read_manifest(self) -> Manifest:
    """What run this is, as `save_manifest` got it.

    Raises:
      InputError: there is none, or it is damaged.
    """
    return manifest.read(self._directory / _MANIFEST)

  def save(
    self,
    step: int,
    state: TrainState,
    data_state: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
  ) -> None:
    """Starts to write a checkpoint and returns once `state` may be donated.

    A step that is there already is left alone.

    Args:
      step: updates done.
      state: as it is after that step.
      data_state: of the prompts' iterator, JSON.
      metrics: those of this step; "eval/accuracy" or "held_out/loss" makes it
        a candidate for best.
    """
    if step in self._manager.all_steps():
      return
    # Not before: `_write_sizes` may still be about the step saved before.
    self.wait()
    self._saving = step
    arrays = _to_dict(state)
    finite = {
      name: float(value)
      for name, value in (metrics or {}).items()
      if math.isfinite(value)
    }
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(arrays),
        data=ocp.args.JsonSave(dict(data_state)),
        arrays=ocp.args.JsonSave(_inventory(arrays)),
      ),
      metrics=finite,
      force=True,
    )

  def latest(self) -> int | None:
    """The newest step saved."""
    return self._manager.latest_step()

  def best(self) -> int | None:
    """The step of the highest accuracy or lowest loss, the newest of equals."""
    step = self._manager.best_step()
    if step is None or _score(self._manager.metrics(step) or {}) == -math.inf:
      return None
    return step

  def improves(self, metrics: Mapping[str, float]) -> bool:
    """Whether a checkpoint with these metrics would be the best so far."""
    best = self._manager.best_step()
    before = self._manager.metrics(best) if best is not None else None
    return _score(metrics) > _score(before or {})

  def read_place(self, step: int) -> dict[str, Any]:
    """What `save` got as `data_state`; no array is read.

    Raises:
      InputError: a damaged checkpoint.
    """
    try:
      return self._manager.restore(
        step, args=ocp.args.Composite(data=ocp.args.JsonRestore())
      )["data"]
    except Exception as error:
      raise self._damaged(step, _first_line(error)) from error

  def restore(
    self, step: int | None, abstract_state: TrainState
  ) -> tuple[TrainState, dict[str, Any]]:
    """Reads a checkpoint.

    Args:
      step: which one; None for the latest.
      abstract_state: `ShapeDtypeStruct`s with the shardings to restore to.

    Returns:
      The state, of the same pytree types as `abstract_state`, and the data
      state.

    Raises:
      InputError: no such step, or a checkpoint that is damaged or does not fit
        `abstract_state`.
    """
    steps = self._manager.all_steps()
    wanted = self.latest() if step is None else step
    if wanted is None or wanted not in steps:
      asked = "" if step is None else f" of step {step}"
      raise InputError(
        f"no checkpoint{asked} in {self._directory}; steps there: "
        f"{_listed(steps)}"
      )
    target = _to_dict(abstract_state)
    # orbax tells of damage by ValueError, KeyError, OSError and Exception.
    try:
      self._check_sizes(wanted)
      texts = self._manager.restore(
        wanted,
        args=ocp.args.Composite(
          data=ocp.args.JsonRestore(), arrays=ocp.args.JsonRestore()
        ),
      )
      saved = {name: tuple(entry) for name, entry in texts["arrays"].items()}
      parts = self._parts(wanted)
    except Exception as error:
      raise self._damaged(wanted, _first_line(error)) from error
    self._check_fits(wanted, saved, target)
    # An earlier version may have known less; what is empty need not be there.
    target = {name: part for name, part in target.items() if name in parts}
    try:
      state = self._manager.restore(
        wanted,
        args=ocp.args.Composite(state=ocp.args.StandardRestore(target)),
      )["state"]
    except jax.errors.JaxRuntimeError:
      raise
    except Exception as error:
      raise self._damaged(wanted, _first_line(error)) from error
    found = _inventory(state)
    bad = [name for name in found if found[name] != saved[name]]
    if bad:
      raise self._damaged(wanted, f"bits of {', '.join(bad[:5])} changed")
    return dataclasses.replace(abstract_state, **state), texts["data"]

  def _write_sizes(self) -> None:
    """Adds a list of files to a checkpoint, just before it becomes visible."""
    if jax.process_index() != 0:
      return
    for folder in self._directory.iterdir():
      if folder.name.split(".")[0] == str(self._saving):
        sizes = {
          str(file.relative_to(folder)): file.stat().length
          for file in _files(folder / "state")
        }
        (folder / _SIZES).write_text(json.dumps(sizes))

  def _parts(self, step: int) -> Collection[str]:
    """The fields of the train state that are saved, empty ones too."""
    reader = ocp.StandardCheckpointHandler()
    found = reader.metadata(self._directory / str(step) / "state")
    reader.close()
    return found.tree.keys()

  def _check_sizes(self, step: int) -> None:
    folder = self._directory / str(step)
    for name, size in json.loads((folder / _SIZES).read_text()).items():
      found = (folder / name).stat().length
      if found != size:
        raise OSError(f"{folder / name} has {found} bytes instead of {size}")

  def _check_fits(
    self,
    step: int,
    saved: Mapping[str, tuple[str, int]],
    target: Mapping[str, Any],
  ) -> None:
    there = {name: form for name, (form, _) in saved.items()}
    here = {name: _form(leaf) for name, leaf in _leaves(target).items()}
    differing = [
      f"{name}: {there.get(name, 'absent')} saved, "
      f"{here.get(name, 'absent')} wanted"
      for name in sorted(there.keys() | here.keys())
      if there.get(name) != here.get(name)
    ]
    if differing:
      raise InputError(
        f"the checkpoint of step {step} in {self._directory} is of another "
        f"model or optimizer: {'; '.join(differing[:5])}. Use the student and "
        "optimizer of that run, or a new workdir"
      )

  def _damaged(self, step: int, why: str) -> InputError:
    earlier = [other for other in self._manager.all_steps() if other < step]
    return InputError(
      f"the checkpoint of step {step} in {self._directory} is damaged: {why}. "
      f"Delete the folder {self._directory / str(step)} to go on from an "
      f"earlier step; there are: {_listed(earlier)}"
    )

  def wait(self) -> None:
    """Waits until what was saved is on disk; raises what went wrong."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, then releases the background threads."""
    self._manager.close()


def _preservation(
  config: CheckpointConfig,
) -> ocp.checkpoint_managers.PreservationPolicy:
  policies = ocp.checkpoint_managers
  latest = policies.LatestN(config.keep_latest)
  if not config.keep_best:
    return latest
  best = policies.BestN(
    get_metric_fn=_score,
    n=1,
    keep_checkpoints_without_metrics=False,
  )
  return policies.AnyPreservationPolicy([latest, best])


def _score(metrics: Mapping[str, float]) -> float:
  """Higher is better: an accuracy, or a loss below all accuracies."""
  return metrics.get(ACCURACY, -metrics.get(LOSS, math.inf))


def _listed(steps: Sequence[int]) -> str:
  return ", ".join(map(str, steps)) or "none"


def _first_line(error: Exception) -> str:
  """Errors of orbax go on with pages of specifications."""
  return f"{type(error).__name__}: {error}".partition("\n")[0]


def _to_dict(state: TrainState) -> dict[str, Any]:
  return {
    field.name: getattr(state, field.name)
    for field in dataclasses.fields(state)
  }


def _files(folder: epath.Path) -> Iterator[epath.Path]:
  for path in folder.iterdir():
    if path.is_dir():
      yield from _files(path)
    else:
      yield path


def _leaves(tree: Mapping[str, Any]) -> dict[str, Any]:
  """Leaves by dotted path."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="."): leaf
    for path, leaf in leaves
  }


def _form(leaf: Any) -> str:
  return f"{leaf.dtype}{list(leaf.shape)}"


def _inventory(tree: Mapping[str, Any]) -> dict[str, tuple[str, int]]:
  """Type and shape, and the sum over the bits, of every array by its path."""
  leaves = _leaves(tree)
  sums = jax.device_get(_bit_sums(list(leaves.values())))
  return {
    name: (_form(leaf), int(total))
    for (name, leaf), total in zip(leaves.items(), sums, strict=True)
  }


@jax.jit
def _bit_sums(leaves: list[Array]) -> list[UInt32[Array, ""]]:
  """Sums of the bit patterns modulo 2**32: the same on every mesh."""

  def bit_sum(leaf: Array) -> UInt32[Array, ""]:
    bits = leaf
    if leaf.dtype != jnp.bool_:
      unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
      bits = jax.lax.bitcast_convert_type(leaf, unsigned)
    return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)

  return [bit_sum(leaf) for leaf in leaves]
