"""What the step of a run is made of, as far as a config and `config.json` say.

No tokenizer, no data and no weights: so `opd-jax plan` compiles the very step
that a run would, on a machine that has none of them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from opd_jax import compatibility, objectives
from opd_jax.config import FrozenModelSource, RunConfig
from opd_jax.models import ModelConfig
from opd_jax.objectives.base import Objective
from opd_jax.scoring import Scorer, Weights
from opd_jax.sharding import Layout
from opd_jax.types import PromptBatch, StepInputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class DomainModel:
  """A teacher of the rows of some data sources.

  Attributes:
    role: the same in words.
    source: its key in the config.
    model: its architecture.
  """

  role: str
  source: FrozenModelSource
  model: ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blueprint:
  """What `setup.make_step` reads.

  Attributes:
    config: of the run.
    student: its architecture.
    teacher: its architecture.
    domain_teachers: the others, in order.
    routes: by data source: index of its teacher in (teacher, *domain_teachers).
    reference: its architecture, if there is one.
    vocab_size: ids that all models and the tokenizer have.
    stop_ids: end a completion.
    objective: what is descended.
    mode: of the step.
    teacher_window: slots of the teacher's own prompts; None where it reads the
      student's.
    given_window: slots of given completions; None where none are given.
  """

  config: RunConfig
  student: ModelConfig
  teacher: ModelConfig
  domain_teachers: tuple[DomainModel, ...]
  routes: tuple[int, ...]
  reference: ModelConfig | None
  vocab_size: int
  stop_ids: tuple[int, ...]
  objective: Objective
  mode: Literal["fused", "split"]
  teacher_window: int | None
  given_window: int | None

  @property
  def shared(self) -> tuple[str, ...]:
    """Frozen models that hold the arrays of another one, by `memory`'s names.

    Of the student's base, or an earlier one of the same checkpoint and dtype.
    """
    config = self.config
    sources = {
      "teacher": config.teacher,
      **{
        f"teacher {number}": other.source
        for number, other in enumerate(self.domain_teachers, start=2)
      },
      "reference": config.reference,
    }
    held = [config.student.as_frozen()] if config.student.lora else []
    found = []
    for role, source in sources.items():
      if source in held:
        found.append(role)
      elif source is not None:
        held.append(source)
    return tuple(found)

  def abstract_inputs(self, layout: Layout) -> StepInputs:
    """Shapes and places of what a step is given."""
    rows = self.config.batch.prompts

    def struct(shape: tuple[int, ...]) -> Any:
      axes = ("batch",) + (None,) * (len(shape) - 1)
      return jax.ShapeDtypeStruct(
        shape, jnp.int32, sharding=layout.sharding(axes)
      )

    def prompts(window: int | None) -> Any:
      if window is None:
        return None
      return PromptBatch(tokens=struct((rows, window)), lengths=struct((rows,)))

    threshold: Any = None
    if self.config.rollout.replay_capacity is not None:
      threshold = jax.ShapeDtypeStruct(
        (), jnp.float32, sharding=layout.replicated()
      )
    several = len(self.config.data.sources) > 1
    return StepInputs(
      prompts=prompts(self.config.data.max_prompt_tokens),
      teacher_prompts=prompts(self.teacher_window),
      given=prompts(self.given_window),
      replay_threshold=threshold,
      sources=struct((rows,)) if several else None,
    )


def abstract_frozen(scorer: Scorer) -> dict[str, Weights]:
  """Shapes, dtypes and places of the frozen weights by role."""

  def shapes(role: str) -> Weights:
    found = [
      model.abstract_params(model.compute_dtype)
      for model in scorer.models(role)
    ]
    return tuple(found) if len(found) > 1 else found[0]

  frozen = {"teacher": shapes("teacher")}
  if scorer.reference is not None:
    frozen["reference"] = shapes("reference")
  student = scorer.student
  if student.lora is not None:
    frozen["base"] = student.abstract_held()
  return frozen


def of_config(
  config: RunConfig, read: Callable[[str], ModelConfig]
) -> Blueprint:
  """The blueprint of a run before any of its files but `config.json` is read.

  What only files say is assumed: all models' ids are in the tokenizer, one id
  stops a completion, and prompts of the teacher's own fit into the student's
  window.

  Args:
    config: of the run.
    read: the architecture of the checkpoint at a path.

  Raises:
    InputError: what the config cannot mean, or `read` raises.
  """
  objective = objectives.create(config.objective)
  compatibility.check_config(config, objective)
  others, routes = route(config)
  named = {
    "student": config.student,
    "teacher": config.teacher,
    **others,
    "reference": config.reference,
  }
  paths = {role: source.path for role, source in named.items() if source}
  models = {role: read(path) for role, path in paths.items()}
  sources = config.data.sources.values()
  own = any(source.teacher_prompt is not None for source in sources)
  given = any(source.given for source in sources)
  teacher_window = config.data.max_prompt_tokens if own else None
  compatibility.check_sampling(config, objective, teacher_window)
  compatibility.check_windows(config, models, paths, teacher_window)
  vocab_size = min(model.vocab_size for model in models.values())
  objective.check_vocabulary(vocab_size)
  stop_ids = config.sampling.stop_ids
  return Blueprint(
    config=config,
    student=models["student"],
    teacher=models["teacher"],
    domain_teachers=tuple(
      DomainModel(role=role, source=source, model=models[role])
      for role, source in others.items()
    ),
    routes=routes,
    reference=models.get("reference"),
    vocab_size=vocab_size,
    stop_ids=(vocab_size - 1,) if stop_ids is None else stop_ids,
    objective=objective,
    mode=mode_of(config, objective),
    teacher_window=teacher_window,
    given_window=config.sampling.max_new_tokens if given else None,
  )


def mode_of(
  config: RunConfig, objective: Objective
) -> Literal["fused", "split"]:
  """The mode that the config asks for, or that the objective takes."""
  return config.mode or ("split" if objective.needs.host else "fused")


def route(
  config: RunConfig,
) -> tuple[dict[str, FrozenModelSource], tuple[int, ...]]:
  """The teachers beside `teacher` by role, and whose the rows of a source are.

  A teacher that several sources name is one. An index counts `teacher` as 0.
  """
  of_source = {
    name: config.domain_teachers.get(name, config.teacher)
    for name in config.data.sources
  }
  found = [config.teacher]
  for source in of_source.values():
    if source not in found:
      found.append(source)
  roles = {}
  for source in found[1:]:
    own = [name for name, teacher in of_source.items() if teacher == source]
    roles[f"teacher of {', '.join(own)}"] = source
  return roles, tuple(found.index(source) for source in of_source.values())
