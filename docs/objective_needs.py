"""What an objective needs of the models, and what that costs, as Markdown."""

import dataclasses

from docs.docstrings import attributes, rows
from opd_jax.objectives.base import ROLES, Needs, Objective, Request


def fields(request: Request) -> list[str]:
  """What is asked of a model."""
  asked = ("logprobs", "entropy", "vocab_logprobs")
  return [field for field in asked if getattr(request, field)]


def signal(objective: Objective) -> str:
  """What an objective sees of the models' distributions."""
  asked = {
    (role, field)
    for needs in (objective.needs, objective.prepare_needs)
    for role in needs.roles()
    for field in fields(getattr(needs, role))
  }
  found = {field for _, field in asked}
  seen = ["tokens"] if "logprobs" in found else []
  if "vocab_logprobs" in found:
    top_k = getattr(objective.config, "top_k", None)
    seen.append("vocabulary" if top_k is None else f"top {top_k}")
  seen += [f"{role}'s entropy" for role, f in sorted(asked) if f == "entropy"]
  return ", ".join(seen)


def conditions(objective: Objective) -> list[str]:
  """The fields of `Needs` that are set besides what is asked of the models."""
  return [
    field.name
    for field in dataclasses.fields(Needs)
    if field.name not in ROLES
    and any(
      getattr(needs, field.name) != field.default
      for needs in (objective.needs, objective.prepare_needs)
    )
  ]


def needed(objective: Objective) -> str:
  """The models that are run, and what is asked of them."""
  told = attributes(Request)
  trained = objective.needs.gradient_roles()
  lines = []
  for reader, needs in (
    ("prepare", objective.prepare_needs),
    ("terms", objective.needs),
  ):
    for role in needs.roles():
      asked = "; ".join(
        f"`{field}`: {told[field].rstrip('.')}"
        for field in fields(getattr(needs, role))
      )
      gradient = "yes" if reader == "terms" and role in trained else "no"
      lines.append((role, asked, f"`{reader}`", gradient))
  found = rows(("model", "what is read", "by", "gradient"), lines)
  meant = attributes(Needs)
  listed = [f"- `{flag}`: {meant[flag]}" for flag in conditions(objective)]
  return "\n\n".join([found, *(["\n".join(listed)] if listed else [])])


def _repeated(objective: Objective) -> list[str]:
  """The roles whose head runs for `prepare` and for `terms` again."""
  before, after = objective.prepare_needs, objective.needs
  trained = after.gradient_roles()
  return [
    role
    for role in before.roles()
    if role in after.roles()
    and (role in trained or not before.covers(after, role))
  ]


def head_passes(objective: Objective) -> dict[str, int]:
  """Products of each model's vocabulary head and the states of all tokens.

  Three where there is a gradient: the logits, and the gradients in the states
  and in the weights.
  """
  trained = objective.needs.gradient_roles()
  again = _repeated(objective)
  read = {*objective.prepare_needs.roles(), *objective.needs.roles()}
  return {
    role: (3 if role in trained else 1) + (role in again)
    for role in ROLES
    if role in read
  }


def prepare_pass(objective: Objective) -> str:
  """What `prepare` costs beyond the update's own passes, in a few words."""
  roles = _repeated(objective)
  if len(roles) > 1:
    return f"the heads of {' and '.join(roles)}"
  return f"the {roles[0]}'s head" if roles else "no"


def cost(objective: Objective) -> str:
  """What is computed and held because of the objective."""
  passes = head_passes(objective)
  frozen = [role for role in passes if role in ("teacher", "reference")]
  widths = " + ".join(
    (f"{count} " if count > 1 else "") + f"D_{role.partition('_')[0]}"
    for role, count in passes.items()
  )
  again = prepare_pass(objective)
  if again != "no":
    trunks = "its trunk" if len(_repeated(objective)) == 1 else "their trunks"
    again += f", counted above; with several micro-batches {trunks} once more"
  lines = [
    ("forward passes of frozen models", ", ".join(frozen) or "none"),
    ("vocabulary heads", f"2 V ({widths}) FLOP per token of a completion"),
    ("distributions", f"[C, V] float32 at a time, of {' and '.join(passes)}"),
    ("pass before the update", again),
  ]
  if (top_k := getattr(objective.config, "top_k", None)) is not None:
    lines.append(("choice of ids", f"the {top_k} largest of V per token"))
  return rows(("what", "how much"), lines)
