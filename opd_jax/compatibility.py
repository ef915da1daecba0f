"""What of a config does not go together, with each other or with the models.

Every function raises `InputError`, before any device work.
"""

from opd_jax.config import RunConfig
from opd_jax.errors import InputError
from opd_jax.models import ModelConfig
from opd_jax.objectives.base import Objective
from opd_jax.selector import reads_teacher

# Options without which an objective is right for tokens of another behavior.
_WITHOUT = {
  "grpo": "set objective.kl to 0",
  "gopd": "set objective.max_weight",
  "exopd": "set objective.max_weight",
}


def check_config(config: RunConfig, objective: Objective) -> None:
  """Raises for what can be told from the config and its objective alone."""
  check_supported(objective)
  check_updates(config, objective)
  check_reference(config, objective)
  check_given(config, objective)
  check_reward(config, objective)
  check_teachers(config, objective)


def check_supported(objective: Objective) -> None:
  """Raises for what no config can give an objective."""
  needs = objective.needs
  if needs.student_privileged:
    raise InputError(
      f"objective {objective.name} needs student_privileged, which a config "
      "cannot name yet; choose an objective without it"
    )


def check_reward(config: RunConfig, objective: Objective) -> None:
  """Raises unless there are rewards exactly where they are needed."""
  needs = objective.needs
  if needs.rewards and config.reward is None:
    raise InputError(
      f"objective {objective.name} needs rewards, and reward is None; set "
      'reward.verifier to "number", "exact" or "module:function", and '
      "data.sources.NAME.answer to what is right"
    )
  if config.reward is not None and not needs.rewards:
    raise InputError(
      f"reward.verifier = {config.reward.verifier!r}, but objective "
      f"{objective.name} with these options reads no rewards; set reward to "
      "None, or choose an objective that needs one, such as grpo"
    )
  if needs.host and config.mode == "fused":
    raise InputError(
      f'mode = "fused", but objective {objective.name} needs the host between '
      'rollout and update; set mode to None or "split"'
    )
  rows = config.batch.rollouts
  if needs.groups and rows == 1:
    raise InputError(
      f"batch.rollouts = {rows}, but objective {objective.name} compares the "
      "completions of a prompt with each other, and one alone has advantage 0; "
      "set batch.rollouts to at least 2, such as 8"
    )


def check_teachers(config: RunConfig, objective: Objective) -> None:
  """Raises where several teachers meet what knows of one, or of none."""
  rollout = config.rollout
  selects = config.selection is not None and reads_teacher(config.selection)
  reads = selects or "teacher" in objective.frozen_roles()
  if config.domain_teachers and not reads:
    named = ", ".join(config.domain_teachers)
    raise InputError(
      f"domain_teachers names teachers for {named}, and objective "
      f"{objective.name} reads none; leave them out, or choose an objective "
      "that does"
    )
  for key, value, why in (
    ("teacher_mix", rollout.teacher_mix, "draws from `teacher` in every row"),
    (
      "replay_capacity",
      rollout.replay_capacity,
      "does not keep whose teacher scores a completion",
    ),
  ):
    if config.domain_teachers and value:
      raise InputError(
        f"rollout.{key} = {value} {why}, and domain_teachers names others for "
        f"{', '.join(config.domain_teachers)}; leave out one of the two"
      )


def check_updates(config: RunConfig, objective: Objective) -> None:
  """Raises where an objective is not defined for a student that has moved."""
  batch = config.batch
  if objective.needs.single_update and batch.updates > 1:
    raise InputError(
      f"objective {objective.name} is right only for tokens of the student as "
      f"it is, and batch.mini_batches x batch.epochs = {batch.mini_batches} x "
      f"{batch.epochs} would update it between; set both to 1, or "
      + _WITHOUT.get(
        objective.name, "take opd_k1, whose ratio weighs for the difference"
      )
    )


def check_reference(config: RunConfig, objective: Objective) -> None:
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


def check_given(config: RunConfig, objective: Objective) -> None:
  """Raises unless given tokens are there exactly where something reads them."""
  needs, rollout = objective.needs.given, config.rollout
  stores = [name for name, one in config.data.sources.items() if one.given]
  if rollout.reads_given and needs == "never":
    raise InputError(
      f"objective {objective.name} is right only for tokens that the student "
      "draws, and config.rollout gives it others (stored_fraction, prefix or "
      "replay_capacity); leave these out, or choose an objective such as gkd, "
      "distillm or tropd"
    )
  if rollout.replay_capacity is not None and not objective.needs.replayed:
    raise InputError(
      f"rollout.replay_capacity = {rollout.replay_capacity} trains on old "
      f"completions of the student, which objective {objective.name} would "
      "take for the teacher's; set it to None, or choose gkd or distillm"
    )
  if needs == "must" and not rollout.reads_given:
    raise InputError(
      f"objective {objective.name} weighs given tokens (objective.guidance), "
      'and there are none; set rollout.prefix to "cosine" and name a store of '
      "the teacher's completions as a source that is given, or leave that "
      "option out"
    )
  if rollout.reads_given and not stores:
    raise InputError(
      "config.rollout uses stored completions, and no source has any; write "
      "them with opd-jax generate --out=FILE.parquet, name that file as a "
      'source in data.sources, and set its "given" to True'
    )
  if stores and not rollout.reads_given:
    raise InputError(
      f"data.sources.{stores[0]}.given is True, and nothing uses its "
      "completions; set rollout.stored_fraction, rollout.prefix or "
      "rollout.replay_capacity, or leave it out"
    )
  capacity = rollout.replay_capacity
  if capacity is None:
    return
  rows = config.batch.prompts * config.batch.rollouts
  if capacity < rows:
    raise InputError(
      f"rollout.replay_capacity = {capacity} is less than the {rows} "
      "completions of a step (batch.prompts x batch.rollouts), which are "
      "replayed together; raise it"
    )
  if any(one.teacher_prompt for one in config.data.sources.values()):
    raise InputError(
      "rollout.replay_capacity keeps the student's prompts only, and a source "
      "has a teacher_prompt; leave one of them out"
    )
  if config.held_out.path is None:
    raise InputError(
      "rollout.replay_capacity has a threshold that follows the held-out loss, "
      "and held_out.path is None; name a file of texts"
    )


def check_windows(
  config: RunConfig,
  models: dict[str, ModelConfig],
  paths: dict[str, str],
  teacher_window: int | None,
) -> None:
  """Raises unless the models have positions for prompt and completion."""
  key, completion = "data.max_prompt_tokens", config.sampling.max_new_tokens
  windows = {"student": (key, config.data.max_prompt_tokens)}
  windows |= dict.fromkeys(models, windows["student"])
  if teacher_window is not None:
    # Every teacher runs over all rows.
    own = ("the longest teacher_prompt", teacher_window)
    windows |= {role: own for role in models if role.startswith("teacher")}
  for role, (name, window) in windows.items():
    positions = models[role].max_positions
    if window + completion > positions:
      raise InputError(
        f"{name} + sampling.max_new_tokens = {window} + {completion} = "
        f"{window + completion} exceeds the {role}'s window of {positions} "
        f"positions ({paths[role]}); lower {key} or "
        "sampling.max_new_tokens"
      )


def check_sampling(
  config: RunConfig, objective: Objective, teacher_window: int | None
) -> None:
  """Raises unless the objective is right for how the tokens are drawn."""
  greedy = config.sampling.temperature == 0
  if greedy and (objective.needs.student.logprobs or objective.needs.groups):
    raise InputError(
      f"sampling.temperature = 0 takes the likeliest token, and objective "
      f"{objective.name} learns from tokens that are drawn by their "
      "probability; set it > 0, or choose an objective over whole "
      "distributions, such as gkd or distillm"
    )
  if objective.needs.pure_sampling and not config.sampling.is_pure:
    sampling = config.sampling
    raise InputError(
      f"objective {objective.name} is right only for tokens drawn from the "
      "student's whole distribution, and got sampling.temperature = "
      f"{sampling.temperature}, top_k = {sampling.top_k}, top_p = "
      f"{sampling.top_p}, min_p = {sampling.min_p}; leave the filters out, or "
      + _WITHOUT.get(
        objective.name, "take opd_k1, which learns over the ids that pass them"
      )
    )
  mix = config.rollout.teacher_mix
  if mix == 0:
    return
  if objective.needs.pure_sampling:
    raise InputError(
      f"objective {objective.name} is right only for tokens drawn from the "
      f"student's whole distribution, and got rollout.teacher_mix = {mix}; set "
      "it to 0, or "
      + _WITHOUT.get(
        objective.name,
        "take opd_k1 or minillm, whose ratios weigh for the mixture",
      )
    )
  if teacher_window is not None:
    raise InputError(
      f"rollout.teacher_mix = {mix} draws from the teacher after the student's "
      "prompts, and a source has a teacher_prompt; leave out one of the two"
    )


def check_batch(config: RunConfig, shards: int) -> None:
  """Raises unless the shards of the batch divide all parts of it."""
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
