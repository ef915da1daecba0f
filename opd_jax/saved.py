"""A model on disk: a Hugging Face checkpoint, an adapter of one, or a run."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from opd_jax import objectives, optim, sft, storage, tokenizer
from opd_jax import student as student_lib
from opd_jax.checkpoint import Checkpoints
from opd_jax.config import RunConfig, SftConfig, TrainedModelSource
from opd_jax.errors import InputError
from opd_jax.loop import CHECKPOINT_FOLDER
from opd_jax.models import Model, ModelConfig, hf, peft
from opd_jax.parsing import parse
from opd_jax.replay import Buffer
from opd_jax.scoring import Parameters
from opd_jax.sharding import DECODE_RULES, TRAIN_RULES, Layout, make_mesh
from opd_jax.storage import AnyPath
from opd_jax.tokenizer import Tokenizer
from opd_jax.types import Params, TrainState
from opd_jax.update import abstract_state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saved:
  """A model that could be loaded; made by `find`.

  Attributes:
    source: the Hugging Face checkpoint with its config.json and tokenizer: for
      a run, that of the student; for an adapter, its base.
    architecture: of the model.
    adapter: folder of an adapter, see `models.peft`; None for anything else.
    workdir: of the run; None for a Hugging Face checkpoint.
    config: of the run; None likewise.
    step: of the run's checkpoint; None likewise.
  """

  source: str
  architecture: ModelConfig
  adapter: AnyPath | None = None
  workdir: AnyPath | None = None
  config: RunConfig | SftConfig | None = None
  step: int | None = None

  def tokenizer(self) -> Tokenizer:
    """Its tokenizer.

    Raises:
      InputError: there is none, or one that cannot be read.
    """
    return tokenizer.load(hf.resolve(self.source))

  def fingerprint(self) -> str:
    """Of the weights, see `hf.fingerprint`.

    Raises:
      InputError: the weights are in no such files: those of a run, or of an
        adapter and its base.
    """
    if self.adapter is not None:
      raise InputError(
        "stored completions name the weights that wrote them by their files, "
        f"and {self.adapter} is an adapter; merge it into its base, and name "
        "the merged model instead"
      )
    if self.workdir is not None:
      raise InputError(
        "stored completions name the weights that wrote them by their files, "
        f"and {self.workdir} is the folder of a run; export it with opd-jax "
        "export, and name that folder instead"
      )
    return hf.fingerprint(self.source)

  def decoder(self, compute_dtype: str, tensor: int, rows: int) -> Model:
    """The model in the decode layout on the devices here.

    Args:
      compute_dtype: of weights and activations.
      tensor: devices that each copy of the model is spread over.
      rows: to draw at the same time; no more copies than these are made.

    Raises:
      InputError: the devices or the model rule `tensor` out.
    """
    available = len(jax.devices())
    if not 1 <= tensor <= available:
      raise InputError(
        f"tensor must be in [1, {available}] (the devices here), got {tensor}"
      )
    copies = min(available // tensor, rows)
    mesh = make_mesh(
      {"fsdp": copies, "tensor": tensor}, jax.devices()[: copies * tensor]
    )
    layout = Layout.create(mesh, DECODE_RULES)
    model = Model(self.architecture, layout, compute_dtype)
    model.abstract_params()
    return model

  def load(self, model: Model) -> Params:
    """The weights in the compute dtype and the places of a decoder.

    Raises:
      InputError: weights that cannot be read.
    """
    dtype = model.compute_dtype
    if self.adapter is not None:
      adapters = peft.read_lora(self.adapter, self.architecture)
      model = dataclasses.replace(model, lora=adapters)
      base = hf.load(self.source, model, dtype)
      return _merge(model, base, peft.load(self.adapter, model))
    if self.config is None:
      return hf.load(self.source, model, dtype)
    student, state = self.restore()
    if student.lora is None:
      return _place(state.params, model.abstract_params(dtype))
    model = dataclasses.replace(model, lora=student.lora)
    base = student_lib.load_base(self._student(self.config), model)
    return _merge(model, base, _place(state.params, model.abstract_trained()))

  def weights(self, student: Model, state: TrainState) -> Params:
    """The weights of a restored student, with its adapters if it has any.

    Args:
      student: from `restore`.
      state: likewise.
    """
    if self.config is None:
      raise ValueError(f"{self.source} is not the folder of a run")
    base = student_lib.load_base(self._student(self.config), student)
    return Parameters(student=state.params, base=base).of("student")

  def _student(self, config: RunConfig | SftConfig) -> TrainedModelSource:
    """What the run started from, at the place where it is now."""
    return dataclasses.replace(config.student, path=self.source)

  def restore(self) -> tuple[Model, TrainState]:
    """A run's student and its state, in the host's memory.

    The devices of the run are not needed.

    Raises:
      InputError: a damaged checkpoint.
    """
    if self.workdir is None or self.config is None:
      raise ValueError(f"{self.source} is not the folder of a run")
    replay = None
    if isinstance(self.config, SftConfig):
      objective = sft.OBJECTIVE
    else:
      objective = objectives.create(self.config.objective)
      replay = Buffer.of(self.config)
    mesh = make_mesh({}, jax.devices("cpu")[:1])
    layout = Layout.create(mesh, TRAIN_RULES)
    student = student_lib.make(self.config.student, self.architecture, layout)
    checkpoints = Checkpoints(self.workdir / CHECKPOINT_FOLDER, None)
    state, _ = checkpoints.restore(
      self.step,
      abstract_state(
        student,
        optim.build(self.config.optimizer, self.config.steps),
        objective,
        replay,
      ),
    )
    checkpoints.close()
    return student, state


def find(path: str | AnyPath, step: str = "latest") -> Saved:
  """Finds a model and checks that its weights are there.

  Args:
    path: the folder of a run, of a Hugging Face checkpoint, of an adapter of
      one as PEFT writes it, each also in a bucket; or `org/name` or
      `org/name@revision` in the Hugging Face cache.
    step: of a run: "latest", "best" or a number.

  Raises:
    InputError: nothing there, or no such step.
  """
  if (storage.to_path(path) / CHECKPOINT_FOLDER).is_dir():
    return find_run(path, step)
  if step != "latest":
    raise InputError(
      f"step is for the folder of a run, and {path} is none; leave it out, or "
      "name the workdir of a run"
    )
  adapter = storage.to_path(path) if peft.is_adapter(path) else None
  source = str(path) if adapter is None else peft.read_base(adapter)
  architecture = hf.read_config(source)
  hf.check(source, architecture)
  if adapter is not None:
    peft.read_lora(adapter, architecture)
  return Saved(source=source, architecture=architecture, adapter=adapter)


def find_run(workdir: str | AnyPath, step: str = "latest") -> Saved:
  """Finds a checkpoint of a run; see `find`."""
  folder = storage.to_path(workdir)
  checkpoints = Checkpoints(folder / CHECKPOINT_FOLDER, None)
  manifest = checkpoints.read_manifest()
  kind = SftConfig if manifest.kind == "sft" else RunConfig
  config = parse(kind, manifest.config)
  number = _step_number(checkpoints, step)
  checkpoints.close()
  source = config.student.path
  if (Path(manifest.folder) / source).is_dir():
    # It may have been named relative to where the run was started.
    source = str(Path(manifest.folder) / source)
  return Saved(
    source=source,
    architecture=hf.read_config(source),
    workdir=folder,
    config=config,
    step=number,
  )


def _place(params: Params, abstract: Params) -> Params:
  """Arrays of the host in the places and dtypes of others."""
  return jax.tree.map(
    lambda leaf, to: jax.device_put(
      np.asarray(leaf).astype(to.dtype), to.sharding
    ),
    params,
    abstract,
  )


def _merge(model: Model, base: Params | None, adapters: Params) -> Params:
  """Weights without adapters, in the compute dtype of a decoder."""
  places = jax.tree.map(lambda leaf: leaf.sharding, model.abstract_params())
  weights = Parameters(student=adapters, base=base).of("student")
  return jax.jit(model.working_copy, out_shardings=places)(weights)


def _step_number(checkpoints: Checkpoints, step: str) -> int | None:
  if step == "latest":
    return checkpoints.latest()
  if step == "best":
    best = checkpoints.best()
    if best is None:
      raise InputError(
        "no checkpoint of this run has an accuracy or a held-out loss, so none "
        "is the best; set eval.source or held_out.path in its config, or take "
        "--step=latest"
      )
    return best
  if not step.isdecimal():
    raise InputError(f"step must be latest, best or a number, got {step!r}")
  return int(step)
