"""From a config to everything a run needs, checked before any device work.

Files are opened, headers read, tokenizers compared, prompts tokenised and the
mesh tried against the models' shapes. What is wrong raises `InputError` here.
"""

import dataclasses

from jax.sharding import Mesh

from opd_jax import evaluate, objectives, optim, sampling, tokenizer
from opd_jax import held_out as held_out_lib
from opd_jax.config import HeldOutConfig, RunConfig, SftConfig
from opd_jax.data.prompts import Prompts
from opd_jax.errors import InputError
from opd_jax.evaluate import Accuracy, Problems
from opd_jax.held_out import HeldOut, HeldOutLoss
from opd_jax.models import Model, ModelConfig, hf
from opd_jax.objectives.base import Objective
from opd_jax.scoring import Scorer
from opd_jax.sharding import DECODE_RULES, TRAIN_RULES, Layout, make_mesh
from opd_jax.step import Step
from opd_jax.task import Measurement
from opd_jax.tokenizer import Difference, Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
  """What a run is made of, on the host.

  Attributes:
    config: of the run.
    student: its architecture.
    teacher: its architecture.
    reference: its architecture, if there is one.
    tokenizer: of the student.
    teacher_tokenizer: of the teacher.
    reference_tokenizer: of the reference, if there is one.
    difference: between the tokenizers of student and teacher.
    vocab_size: ids that all models and the tokenizer have.
    stop_ids: end a completion.
    prompts: endless batches.
    held_out: texts of the held-out loss, if there are any.
    problems: of the evaluation, as the student is asked, if there is one.
    teacher_problems: as the teacher is asked, if it is evaluated too.
    objective: what is descended.
  """

  config: RunConfig
  student: ModelConfig
  teacher: ModelConfig
  reference: ModelConfig | None
  tokenizer: Tokenizer
  teacher_tokenizer: Tokenizer
  reference_tokenizer: Tokenizer | None
  difference: Difference
  vocab_size: int
  stop_ids: tuple[int, ...]
  prompts: Prompts
  held_out: HeldOut | None
  problems: Problems | None
  teacher_problems: Problems | None
  objective: Objective


def prepare(config: RunConfig) -> Setup:
  """Reads all a run needs, and checks it as far as it cannot go on without.

  What may be wrong although it could run is the business of
  `preflight.inspect`.

  Raises:
    InputError: whatever is wrong with the config, the checkpoints, the
      tokenizers or the data.
  """
  objective = objectives.create(config.objective)
  _check_supported(objective)
  _check_updates(config, objective)
  _check_reference(config, objective)
  models = {}
  for role, source in (
    ("student", config.student),
    ("teacher", config.teacher),
    ("reference", config.reference),
  ):
    if source is not None:
      models[role] = hf.read_config(source.path)
      hf.check(source.path, models[role])
  student_tokenizer = tokenizer.load(hf.resolve(config.student.path))
  teacher_tokenizer = tokenizer.load(hf.resolve(config.teacher.path))
  reference_tokenizer = None
  if config.reference is not None:
    reference_tokenizer = tokenizer.load(hf.resolve(config.reference.path))
  difference = tokenizer.compare(student_tokenizer, teacher_tokenizer)
  vocab_size = min(
    *(model.vocab_size for model in models.values()),
    student_tokenizer.id_count,
  )
  stop_ids = config.sampling.stop_ids
  if stop_ids is None:
    stop_ids = student_tokenizer.stop_ids
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
    )
  except InputError as error:
    # An id too large may only be a sign of two tokenizer families.
    obstacle = tokenizer.explain(
      student_tokenizer, teacher_tokenizer, difference
    )
    if obstacle is None or "tokenizers_differ" in config.preflight.allow:
      raise
    raise InputError(obstacle) from error
  _check_sampling(config, objective, prompts)
  _check_windows(config, models, prompts)
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
    decode = Layout.create(student.layout.mesh, DECODE_RULES)
    decoder = dataclasses.replace(student, layout=decode, remat="none")
    found.append(Accuracy(problems, decoder))
  return found


def make_step(setup: Setup, mesh: Mesh | None = None) -> Step:
  """The step of a run on a mesh, by default that of the config.

  Raises:
    InputError: the mesh divides neither the devices, the batch nor a model.
  """
  config = setup.config
  if mesh is None:
    mesh = make_mesh(dataclasses.asdict(config.mesh))
  train = Layout.create(mesh, TRAIN_RULES)
  decode = Layout.create(mesh, DECODE_RULES)
  _check_batch(config, train.shards("batch"))
  student = Model(
    setup.student, train, config.student.compute_dtype, config.student.remat
  )
  teacher = Model(setup.teacher, train, config.teacher.compute_dtype)
  models = {"student": student, "teacher": teacher}
  reference = None
  if setup.reference is not None and config.reference is not None:
    reference = Model(setup.reference, train, config.reference.compute_dtype)
    models["reference"] = reference
  for role, model in models.items():
    try:
      model.abstract_params()
    except InputError as error:
      raise InputError(f"{role}: {error}") from error
  scorer = Scorer(
    student=student,
    teacher=teacher,
    reference=reference,
    vocab_size=setup.vocab_size,
    temperature=config.sampling.temperature or 1.0,
    chunk_tokens=config.batch.chunk_tokens,
  )
  teacher_mix = config.rollout.teacher_mix
  teacher_decoder = None
  if teacher_mix > 0:
    teacher_decoder = Model(setup.teacher, decode, config.teacher.compute_dtype)
  return Step(
    decoder=Model(setup.student, decode, config.student.compute_dtype),
    teacher_decoder=teacher_decoder,
    teacher_mix=teacher_mix,
    scorer=scorer,
    objective=setup.objective,
    optimizer=optim.build(config.optimizer, config.steps, config.batch.updates),
    learning_rate=optim.learning_rate(config.optimizer, config.steps),
    sampling=config.sampling,
    stop_ids=setup.stop_ids,
    rollouts=config.batch.rollouts,
    mini_batches=config.batch.mini_batches,
    epochs=config.batch.epochs,
    micro_batches=config.batch.micro_batches,
    steps=config.steps,
    seed=config.seed,
  )


def _check_supported(objective: Objective) -> None:
  needs = objective.needs
  if needs.student_privileged:
    raise InputError(
      f"objective {objective.name} needs student_privileged, which a config "
      "cannot name yet; choose an objective without it"
    )
  if needs.host:
    raise InputError(
      f"objective {objective.name} needs a host stage, and none is registered"
    )


def _check_updates(config: RunConfig, objective: Objective) -> None:
  """Raises where an objective is not defined for a student that has moved."""
  batch = config.batch
  if objective.needs.single_update and batch.updates > 1:
    raise InputError(
      f"objective {objective.name} is right only for tokens of the student as "
      f"it is, and batch.mini_batches x batch.epochs = {batch.mini_batches} x "
      f"{batch.epochs} would update it between; set both to 1, or take opd_k1, "
      "whose ratio weighs for the difference"
    )


def _check_reference(config: RunConfig, objective: Objective) -> None:
  """Raises unless there is a reference exactly where one is needed."""
  needed = objective.needs.reference or objective.prepare_needs.reference
  if needed and config.reference is None:
    raise InputError(
      f"objective {objective.name} with these options needs a reference model, "
      "and reference is None; set reference.path to the checkpoint that the "
      f"student starts from ({config.student.path}), or to the one that the "
      "teacher was trained from"
    )
  if config.reference is not None and not needed:
    raise InputError(
      f"reference.path = {config.reference.path!r}, but objective "
      f"{objective.name} with these options reads no reference model, which "
      "would take memory for nothing; set reference to None, or choose an "
      "objective that needs one, such as exopd"
    )


def _check_windows(
  config: RunConfig, models: dict[str, ModelConfig], prompts: Prompts
) -> None:
  """Raises unless the models have positions for prompt and completion."""
  key, completion = "data.max_prompt_tokens", config.sampling.max_new_tokens
  windows = {"student": (key, config.data.max_prompt_tokens)}
  windows |= dict.fromkeys(models, windows["student"])
  if prompts.teacher_window is not None:
    windows["teacher"] = ("the longest teacher_prompt", prompts.teacher_window)
  for role, (name, window) in windows.items():
    positions = models[role].max_positions
    if window + completion > positions:
      raise InputError(
        f"{name} + sampling.max_new_tokens = {window} + {completion} = "
        f"{window + completion} exceeds the {role}'s window of {positions} "
        f"positions ({getattr(config, role).path}); lower {key} or "
        "sampling.max_new_tokens"
      )


def _check_sampling(
  config: RunConfig, objective: Objective, prompts: Prompts
) -> None:
  """Raises unless the objective is right for how the tokens are drawn."""
  if objective.needs.pure_sampling and not config.sampling.is_pure:
    sampling = config.sampling
    raise InputError(
      f"objective {objective.name} is right only for tokens drawn from the "
      "student's whole distribution, and got sampling.temperature = "
      f"{sampling.temperature}, top_k = {sampling.top_k}, top_p = "
      f"{sampling.top_p}, min_p = {sampling.min_p}; leave the filters out with "
      "a temperature > 0, or take opd_k1, whose ratio weighs for them"
    )
  mix = config.rollout.teacher_mix
  if mix == 0:
    return
  if objective.needs.pure_sampling:
    raise InputError(
      f"objective {objective.name} is right only for tokens drawn from the "
      f"student's whole distribution, and got rollout.teacher_mix = {mix}; set "
      "it to 0, or take opd_k1 or minillm, whose ratios weigh for the mixture"
    )
  if prompts.teacher_window is not None:
    raise InputError(
      f"rollout.teacher_mix = {mix} draws from the teacher after the student's "
      "prompts, and a source has a teacher_prompt; leave out one of the two"
    )


def _check_batch(config: RunConfig, shards: int) -> None:
  batch = config.batch
  prompts = batch.prompts // batch.mini_batches
  rows = prompts * batch.rollouts // batch.micro_batches
  named = f"batch.prompts = {batch.prompts}"
  if batch.mini_batches > 1:
    named = f"{named} / batch.mini_batches = {prompts}"
  for name, size in (
    (named, prompts),
    (f"rows of a micro-batch = {rows}", rows),
  ):
    if size % shards:
      raise InputError(
        f"{name} is not divisible by the {shards} shards of the batch (mesh "
        "replica x fsdp); change batch.prompts, batch.mini_batches, "
        "batch.micro_batches or mesh"
      )
