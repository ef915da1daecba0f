"""From a config to everything a run needs, checked before any device work.

Files are opened, headers read, tokenizers compared, prompts tokenised and the
mesh tried against the models' shapes. What is wrong raises `InputError` here.
"""

import dataclasses
from collections.abc import Mapping

from jax.sharding import Mesh

from opd_jax import (
  compatibility,
  evaluate,
  objectives,
  optim,
  rewards,
  sampling,
  tokenizer,
)
from opd_jax import held_out as held_out_lib
from opd_jax import student as student_lib
from opd_jax.blueprint import Blueprint, DomainModel, mode_of, route
from opd_jax.config import (
  FrozenModelSource,
  HeldOutConfig,
  RunConfig,
  SftConfig,
)
from opd_jax.data import store
from opd_jax.data.prompts import Prompts
from opd_jax.data.store import Origin
from opd_jax.errors import InputError
from opd_jax.evaluate import Accuracy, Problems
from opd_jax.held_out import HeldOut, HeldOutLoss
from opd_jax.models import Model, ModelConfig, hf
from opd_jax.replay import Buffer
from opd_jax.rewards import Rewards
from opd_jax.scoring import Scorer
from opd_jax.selector import Selector
from opd_jax.sharding import Layout, layouts, make_mesh
from opd_jax.step import Step
from opd_jax.task import Measurement
from opd_jax.tokenizer import Difference, Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class DomainTeacher(DomainModel):
  """A teacher of the rows of some data sources, with its tokenizer.

  Attributes:
    tokenizer: of it.
    difference: between the student's tokenizer and its.
  """

  tokenizer: Tokenizer
  difference: Difference


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup(Blueprint):
  """What a run is made of, on the host.

  Attributes:
    domain_teachers: the others, in order.
    tokenizer: of the student.
    teacher_tokenizer: of the teacher.
    reference_tokenizer: of the reference, if there is one.
    difference: between the tokenizers of student and teacher.
    prompts: endless batches.
    held_out: texts of the held-out loss, if there are any.
    problems: of the evaluation, as the student is asked, if there is one.
    teacher_problems: as the teacher is asked, if it is evaluated too.
    origins: of the stores among the sources, by the names of these.
    rewards: the host stage of the step, if there is one.
  """

  domain_teachers: tuple[DomainTeacher, ...]
  tokenizer: Tokenizer
  teacher_tokenizer: Tokenizer
  reference_tokenizer: Tokenizer | None
  difference: Difference
  prompts: Prompts
  held_out: HeldOut | None
  problems: Problems | None
  teacher_problems: Problems | None
  origins: Mapping[str, Origin]
  rewards: Rewards | None

  def teacher_tokenizer_of(self, source: str) -> Tokenizer:
    """Of the teacher that scores the rows of a data source."""
    number = self.routes[list(self.config.data.sources).index(source)]
    others = (teacher.tokenizer for teacher in self.domain_teachers)
    return (self.teacher_tokenizer, *others)[number]


def prepare(config: RunConfig) -> Setup:
  """Reads all a run needs, and checks it as far as it cannot go on without.

  What may be wrong although it could run is the business of
  `preflight.inspect`.

  Raises:
    InputError: whatever is wrong with the config, the checkpoints, the
      tokenizers or the data.
  """
  objective = objectives.create(config.objective)
  compatibility.check_config(config, objective)
  models = {}
  paths = {}
  others, routes = route(config)
  for role, source in (
    ("student", config.student),
    ("teacher", config.teacher),
    *others.items(),
    ("reference", config.reference),
  ):
    if source is not None:
      models[role] = hf.read_config(source.path)
      hf.check(source.path, models[role])
      paths[role] = source.path
  student_tokenizer = tokenizer.load(hf.resolve(config.student.path))
  teacher_tokenizer = tokenizer.load(hf.resolve(config.teacher.path))
  reference_tokenizer = None
  if config.reference is not None:
    reference_tokenizer = tokenizer.load(hf.resolve(config.reference.path))
  difference = tokenizer.compare(student_tokenizer, teacher_tokenizer)
  domain_teachers = []
  for role, source in others.items():
    tokens = tokenizer.load(hf.resolve(source.path))
    domain_teachers.append(
      DomainTeacher(
        role=role,
        source=source,
        model=models[role],
        tokenizer=tokens,
        difference=tokenizer.compare(student_tokenizer, tokens),
      )
    )
  vocab_size = min(
    *(model.vocab_size for model in models.values()),
    student_tokenizer.id_count,
  )
  stop_ids = config.sampling.stop_ids
  if stop_ids is None:
    stop_ids = student_tokenizer.stop_ids
  tokenizers = (
    teacher_tokenizer,
    *(each.tokenizer for each in domain_teachers),
  )
  origins = _origins(
    config,
    student_tokenizer,
    teacher_tokenizer,
    {
      name: tokenizers[number]
      for name, number in zip(config.data.sources, routes, strict=True)
    },
    stop_ids,
  )
  try:
    objective.check_vocabulary(vocab_size)
    sampling.check(config.sampling, stop_ids, config.batch.rollouts, vocab_size)
    prompts = Prompts(
      config.data,
      student_tokenizer,
      teacher_tokenizer,
      seed=config.seed,
      batch_size=config.batch.prompts,
      vocab_size=vocab_size,
      teacher_vocab_size=models["teacher"].vocab_size,
      completion_tokens=config.sampling.max_new_tokens,
      stop_ids=stop_ids,
      domain_teachers={
        name: (
          domain_teachers[number - 1].tokenizer,
          domain_teachers[number - 1].model.vocab_size,
        )
        for name, number in zip(config.data.sources, routes, strict=True)
        if number > 0
      },
      with_answers=config.reward is not None,
    )
  except InputError as error:
    # An id too large may only be a sign of two tokenizer families.
    for tokens, difference_of, role in (
      (teacher_tokenizer, difference, "teacher"),
      *(
        (each.tokenizer, each.difference, each.role) for each in domain_teachers
      ),
    ):
      obstacle = tokenizer.explain(
        student_tokenizer, tokens, difference_of, role
      )
      if obstacle is not None:
        break
    if obstacle is None or "tokenizers_differ" in config.preflight.allow:
      raise
    raise InputError(obstacle) from error
  window = prompts.teacher_window
  compatibility.check_sampling(config, objective, window)
  compatibility.check_windows(config, models, paths, window)
  problems = evaluate.of_run(
    config.eval, config.sampling, student_tokenizer, models["student"]
  )
  teacher_problems = None
  if config.eval.source is not None and config.eval.teacher:
    teacher_problems = evaluate.prepare(
      config.eval,
      config.sampling,
      teacher_tokenizer,
      models["teacher"],
      config.eval.source.teacher_prompt,
    )
  return Setup(
    config=config,
    student=models["student"],
    teacher=models["teacher"],
    domain_teachers=tuple(domain_teachers),
    routes=routes,
    reference=models.get("reference"),
    tokenizer=student_tokenizer,
    teacher_tokenizer=teacher_tokenizer,
    reference_tokenizer=reference_tokenizer,
    difference=difference,
    vocab_size=vocab_size,
    stop_ids=stop_ids,
    prompts=prompts,
    held_out=read_held_out(
      config.held_out, models["student"], student_tokenizer
    ),
    problems=problems,
    teacher_problems=teacher_problems,
    objective=objective,
    origins=origins,
    rewards=None
    if config.reward is None
    else rewards.prepare(config.reward, student_tokenizer, prompts),
    mode=mode_of(config, objective),
    teacher_window=prompts.teacher_window,
    given_window=prompts.given_window,
  )


def read_held_out(
  config: HeldOutConfig, student: ModelConfig, tokenizer: Tokenizer
) -> HeldOut | None:
  """The texts of the held-out loss, or None if there is none.

  Raises:
    InputError: see `held_out.read`; also a text longer than the window.
  """
  if config.path is None:
    return None
  texts = held_out_lib.read(config, tokenizer.encode, student.vocab_size)
  longest = texts.tokens.shape[-1]
  if longest > student.max_positions:
    raise InputError(
      f"a text of {config.path} has {longest} tokens, more than the student's "
      f"window of {student.max_positions} positions ({tokenizer.path}); set "
      "held_out.max_tokens to at most that"
    )
  return texts


def measurements(
  config: RunConfig | SftConfig,
  student: Model,
  held_out: HeldOut | None,
  problems: Problems | None,
) -> list[Measurement]:
  """What is measured of the student's weights, apart from the steps.

  Args:
    config: of the run.
    student: in the training layout.
    held_out: texts of the held-out loss, if there are any.
    problems: of the evaluation, if there is one.
  """
  found: list[Measurement] = []
  if held_out is not None:
    found.append(HeldOutLoss(held_out, student, config.held_out.every))
  if problems is not None:
    _, decode = layouts(student.layout.mesh, config.mesh)
    decoder = dataclasses.replace(student, layout=decode, remat="none")
    found.append(Accuracy(problems, decoder))
  return found


def make_step(setup: Blueprint, mesh: Mesh | None = None) -> Step:
  """The step of a run on a mesh, by default that of the config.

  Raises:
    InputError: the mesh divides neither the devices, the batch nor a model.
  """
  config = setup.config
  if mesh is None:
    mesh = make_mesh(config.mesh.sizes)
  train, decode = layouts(mesh, config.mesh)
  for layout in (train, decode):
    compatibility.check_batch(config, layout.shards("batch"))
  student = student_lib.make(config.student, setup.student, train)
  teacher = _frozen(setup.teacher, train, config.teacher)
  others = {
    other.role: _frozen(other.model, train, other.source)
    for other in setup.domain_teachers
  }
  models = {"student": student, "teacher": teacher, **others}
  reference = None
  if setup.reference is not None and config.reference is not None:
    reference = _frozen(setup.reference, train, config.reference)
    models["reference"] = reference
  for role, model in models.items():
    try:
      model.abstract_params()
    except InputError as error:
      raise InputError(f"{role}: {error}") from error
  scorer = Scorer(
    student=student,
    teacher=teacher,
    other_teachers=tuple(others.values()),
    routes=setup.routes if others else (),
    reference=reference,
    vocab_size=setup.vocab_size,
    temperature=config.sampling.temperature or 1.0,
    chunk_tokens=config.batch.chunk_tokens,
  )
  teacher_decoder = None
  if config.rollout.teacher_mix > 0:
    teacher_decoder = dataclasses.replace(teacher, layout=decode)
  selector = None
  if config.selection is not None:
    selector = Selector(config=config.selection, vocab_size=setup.vocab_size)
  return Step(
    decoder=dataclasses.replace(student, layout=decode, remat="none"),
    teacher_decoder=teacher_decoder,
    scorer=scorer,
    objective=setup.objective,
    optimizer=optim.build(config.optimizer, config.steps, config.batch.updates),
    learning_rate=optim.learning_rate(config.optimizer, config.steps),
    sampling=config.sampling,
    stop_ids=setup.stop_ids,
    rollouts=config.batch.rollouts,
    mini_batches=config.batch.mini_batches,
    epochs=config.batch.epochs,
    mixing=config.rollout,
    replay=Buffer.of(config),
    micro_batches=config.batch.micro_batches,
    steps=config.steps,
    seed=config.seed,
    selector=selector,
    sources=_told_apart(config),
  )


def _frozen(
  architecture: ModelConfig, layout: Layout, config: FrozenModelSource
) -> Model:
  return Model(
    architecture,
    layout,
    config.compute_dtype,
    weight_dtype=config.weight_dtype,
    offload=config.offload,
  )


def _told_apart(config: RunConfig) -> tuple[str, ...]:
  """Sources whose rows have metrics of their own; a replayed row has none."""
  several = len(config.data.sources) > 1
  if not several or config.rollout.replay_capacity is not None:
    return ()
  return tuple(config.data.sources)


def _origins(
  config: RunConfig,
  student: Tokenizer,
  teacher: Tokenizer,
  teachers: Mapping[str, Tokenizer],
  stop_ids: tuple[int, ...],
) -> dict[str, Origin]:
  """Who wrote the given completions, by source; their ids are this run's.

  Args:
    config: of the run.
    student: its tokenizer.
    teacher: that of `config.teacher`.
    teachers: by source, that of the teacher of its rows.
    stop_ids: of the run.
  """
  found = {}
  for name, source in config.data.sources.items():
    if not source.given:
      continue
    found[name] = origin = store.read_origin(source.path)
    readers = (student, teacher, teachers[name])
    known = {reader.fingerprint() for reader in readers}
    if origin.tokenizer not in known:
      raise InputError(
        f"{source.path} holds ids of another tokenizer than that of student "
        f"{student.path} and teacher {teachers[name].path}: {origin.model} "
        "wrote them; generate the store again with this run's teacher"
      )
    own = origin.sampling["stop_ids"]
    missing = [number for number in own if number not in stop_ids]
    if missing:
      raise InputError(
        f"{source.path} was written with stop ids {own}, and {missing} do not "
        "end a completion in this run, which would go on behind them; set "
        f"sampling.stop_ids to {own}, or generate the "
        "store again with those of this run"
      )
  return found
