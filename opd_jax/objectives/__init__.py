"""Objectives by name: a new one is one file and one entry here."""

import difflib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from opd_jax import parsing
from opd_jax.errors import InputError
from opd_jax.objectives import (
  aopd,
  constant_negative_advantage,
  distillm,
  eopd,
  exopd,
  gkd,
  gopd,
  grpo,
  minillm,
  opd_k1,
  opd_k2,
  reopold,
  tropd,
)
from opd_jax.objectives.base import Objective

OBJECTIVES: dict[str, ModuleType] = {
  "aopd": aopd,
  "constant_negative_advantage": constant_negative_advantage,
  "distillm": distillm,
  "eopd": eopd,
  "exopd": exopd,
  "gkd": gkd,
  "gopd": gopd,
  "grpo": grpo,
  "minillm": minillm,
  "opd_k1": opd_k1,
  "opd_k2": opd_k2,
  "reopold": reopold,
  "tropd": tropd,
}


def create(options: Mapping[str, Any]) -> Objective:
  """The objective `options["name"]` with its other options.

  Raises:
    InputError: unknown name, unknown option, or a value out of range.
  """
  options = dict(options.items())
  name = options.pop("name")
  if name not in OBJECTIVES:
    near = difflib.get_close_matches(str(name), OBJECTIVES, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    if name == "sft":
      hint = " Supervised fine-tuning is a command of its own: opd-jax sft."
    raise InputError(
      f"unknown objective {name!r}; known: {', '.join(sorted(OBJECTIVES))}."
      f"{hint}"
    )
  module = OBJECTIVES[name]
  try:
    config = parsing.parse(module.Config, options, "objective.")
  except InputError as error:
    raise InputError(f"objective {name}: {error}") from error
  return Objective.bind(name, module, config)
