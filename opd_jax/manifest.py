"""What run a folder of checkpoints is of, and whether a run may go on there."""

import dataclasses
import importlib.metadata
import json
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

import opd_jax
from opd_jax.config import RunConfig, SftConfig
from opd_jax.errors import InputError

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# Config keys, dotted, that a resumed run may change: the steps done stay what
# they are. (With more steps a schedule stretches from there on.) What is
# measured may not change: before, after and best would not be of the same.
_FREE_KEYS = (
  "steps",
  "mode",
  "mesh",
  "topology",
  "held_out.every",
  "held_out.batch",
  "eval.every",
  "eval.batch",
  "preflight",
  "checkpoint",
  "log",
  "batch.micro_batches",
  "batch.chunk_tokens",
  "student.remat",
)
# Except where the held-out loss moves the threshold of a replay buffer.
_OF_THE_LOSS = ("held_out.every", "held_out.batch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
  """What run a folder of checkpoints is of.

  Attributes:
    kind: the command that made it, "train" or "sft".
    config: of the run, as nested dicts.
    folder: that it was started in; relative paths of the config start there.
  """

  kind: str
  config: Mapping[str, Any]
  folder: str


def read(file: epath.Path) -> Manifest:
  """Reads a manifest.

  Raises:
    InputError: there is none, or it is damaged.
  """
  if not file.exists():
    raise InputError(
      f"there is no {file}, which says what run this is; give the workdir of a "
      "run that has started"
    )
  try:
    values = json.loads(file.read_text())
    return Manifest(
      kind=values["kind"], config=values["config"], folder=values["folder"]
    )
  except (ValueError, KeyError, TypeError) as error:
    raise InputError(
      f"{file} is damaged ({error!r}); delete it if the checkpoints beside it "
      "are of this very run"
    ) from error


def write(file: epath.Path, kind: str, config: RunConfig | SftConfig) -> None:
  """Writes the manifest of a run that starts here and now."""
  versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
  versions["opd_jax"] = opd_jax.__version__
  values = {
    "kind": kind,
    "config": _plain(config),
    "folder": os.getcwd(),
    "versions": versions,
  }
  partial = file.with_name(f"{file.name}.partial")
  partial.write_text(json.dumps(values, indent=2) + "\n")
  partial.replace(file)


def check(
  saved: Manifest, kind: str, config: RunConfig | SftConfig, directory: str
) -> None:
  """Refuses a run that is not the one of a folder.

  Args:
    saved: of the folder.
    kind: of the run.
    config: of the run.
    directory: for messages.

  Raises:
    InputError: another kind, or a config that differs in a key that changes
      what is computed or measured.
  """
  if saved.kind != kind:
    raise InputError(
      f"{directory} holds checkpoints of opd-jax {saved.kind}, not of {kind}; "
      "use that command to resume it, or a new workdir"
    )
  before = _flatten(_completed(saved.config, config))
  now = _flatten(_plain(config))
  free = set(_FREE_KEYS)
  if now.get("rollout.replay_capacity") is not None:
    free -= set(_OF_THE_LOSS)
  differing = [
    f"{key}: {before.get(key, 'absent')!r} saved, {now.get(key, 'absent')!r} "
    "given"
    for key in sorted(before.keys() | now.keys())
    if before.get(key) != now.get(key)
    and not any(f"{key}.".startswith(f"{name}.") for name in free)
  ]
  if differing:
    raise InputError(
      f"{directory} holds checkpoints of another run; {'; '.join(differing)}. "
      "Give these values back to resume it, or use a new workdir"
    )


def _plain(values: Any) -> Any:
  """Config values as JSON has them."""
  return json.loads(json.dumps(values, default=dataclasses.asdict))


def _completed(saved: Any, config: Any) -> Any:
  """Saved values, and the defaults of keys that were not there to be saved."""
  if not isinstance(saved, Mapping):
    return saved
  if isinstance(config, Mapping):
    return {
      key: _completed(value, config.get(key)) for key, value in saved.items()
    }
  if not dataclasses.is_dataclass(config):
    return saved
  completed = {}
  for field in dataclasses.fields(config):
    if field.default is not dataclasses.MISSING:
      completed[field.name] = _plain(field.default)
    elif field.default_factory is not dataclasses.MISSING:
      completed[field.name] = _plain(field.default_factory())
  for key, value in saved.items():
    completed[key] = _completed(value, getattr(config, key, None))
  return completed


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Values of nested dicts by dotted key."""
  flat: dict[str, Any] = {}
  for key, value in values.items():
    if isinstance(value, Mapping):
      flat.update(_flatten(value, f"{prefix}{key}."))
    else:
      flat[prefix + key] = value
  return flat
