"""Tokenizers, rows of the models, special and stop ids."""

from collections.abc import Iterator, Sequence
from typing import Any

from opd_jax import tokenizer as tokenizer_lib
from opd_jax.models import ModelConfig, hf
from opd_jax.preflight.report import Finding, Section, table
from opd_jax.setup import Setup
from opd_jax.tokenizer import Difference, Tokenizer


def inspect(setup: Setup) -> Section:
  """Compares the ids of the models; reads a few rows of the student."""
  models = _models(setup)
  tokenizers = [tokens for _, tokens, _ in models]
  rows = [
    ("", *(role for role, _, _ in models)),
    ("rows of the model", *(f"{model.vocab_size:,}" for *_, model in models)),
    ("ids of the tokenizer", *(f"{each.id_count:,}" for each in tokenizers)),
    (
      "rows masked",
      *(f"{model.vocab_size - setup.vocab_size:,}" for *_, model in models),
    ),
    *(
      (
        same[0][0],
        *(
          _shown(each, [index])
          for each, (_, index) in zip(tokenizers, same, strict=True)
        ),
      )
      for same in zip(*(each.special_ids for each in tokenizers), strict=True)
    ),
    ("stop ids", *(_shown(each, each.stop_ids) for each in tokenizers)),
  ]
  differing = max(difference.ids for *_, difference in _teachers(setup))
  lines = (
    *table(rows),
    f"shared ids: {setup.vocab_size:,}; {differing:,} of them differ",
    f"a completion ends at {_shown(setup.tokenizer, setup.stop_ids)}",
  )
  return Section(
    title="vocabulary",
    lines=lines,
    figures={
      "shared_ids": setup.vocab_size,
      "differing_ids": differing,
      "stop_ids": list(setup.stop_ids),
      **{
        f"{role}_{name}": value
        for role, tokens, model in models
        for name, value in (
          ("rows", model.vocab_size),
          ("masked_rows", model.vocab_size - setup.vocab_size),
          ("ids", tokens.id_count),
          ("stop_ids", list(tokens.stop_ids)),
        )
      },
    },
    findings=(*_of_tokenizers(setup), *_of_stop_ids(setup)),
  )


def _models(setup: Setup) -> list[tuple[str, Tokenizer, ModelConfig]]:
  """Role, tokenizer and architecture of the models of a run."""
  models = [
    ("student", setup.tokenizer, setup.student),
    ("teacher", setup.teacher_tokenizer, setup.teacher),
    *(
      (other.role, other.tokenizer, other.model)
      for other in setup.domain_teachers
    ),
  ]
  if setup.reference is not None and setup.reference_tokenizer is not None:
    models.append(("reference", setup.reference_tokenizer, setup.reference))
  return models


def _teachers(
  setup: Setup,
) -> list[tuple[str, Tokenizer, ModelConfig, Difference]]:
  """Role, tokenizer, architecture and how its ids differ from the student's."""
  first = setup.teacher_tokenizer, setup.teacher, setup.difference
  return [
    ("teacher", *first),
    *(
      (other.role, other.tokenizer, other.model, other.difference)
      for other in setup.domain_teachers
    ),
  ]


def _of_tokenizers(setup: Setup) -> Iterator[Finding]:
  student = setup.tokenizer
  for role, tokens, _, difference in _teachers(setup):
    obstacle = tokenizer_lib.explain(student, tokens, difference, role)
    if obstacle is not None:
      yield Finding(name="tokenizers_differ", message=obstacle)
  reference = setup.reference_tokenizer
  if reference is not None:
    difference = tokenizer_lib.compare(student, reference)
    obstacle = tokenizer_lib.explain(
      student, reference, difference, "reference"
    )
    if obstacle is not None:
      yield Finding(name="tokenizers_differ", message=obstacle)
  for role, tokens, model in _models(setup):
    if tokens.id_count > model.vocab_size:
      yield Finding(
        name="tokenizer_exceeds_model",
        message=(
          f"the {role}'s tokenizer ({tokens.path}) has {tokens.id_count:,} "
          f"ids, its model {model.vocab_size:,} rows; use the tokenizer that "
          "belongs to the checkpoint, or resize the model's embedding"
        ),
      )
  for role, _, model, difference in _teachers(setup):
    first = model.vocab_size
    if student.id_count > first:
      yield Finding(
        name="ids_without_teacher",
        message=(
          f"ids {first} to {student.id_count - 1} of the student (the first is "
          f"{student.vocabulary.get(first)!r}) have no row in the {role}'s "
          f"{first:,}: they are never drawn, and a prompt that holds one is "
          "refused; leave those tokens out of prompts, or choose another "
          "teacher"
        ),
      )
    if not difference.special_ids:
      continue
    told = ", ".join(
      f"{name} {ours} / {theirs}"
      for name, ours, theirs in difference.special_ids
    )
    yield Finding(
      name="special_ids_differ",
      message=(
        f"student / {role}: {told}; usual between a base model and its chat "
        "version: make sure that prompts and sampling.stop_ids are those of "
        "the kind of text both should write"
      ),
    )


def _of_stop_ids(setup: Setup) -> Iterator[Finding]:
  student, config = setup.tokenizer, setup.config
  chosen = config.sampling.stop_ids
  if not setup.stop_ids and chosen is None:
    yield Finding(
      name="no_stop_id",
      message=(
        f"neither generation_config.json nor the tokenizer in {student.path} "
        "names an end-of-sequence id, so every completion has "
        f"{config.sampling.max_new_tokens} tokens; name one in "
        "sampling.stop_ids, or set it to () if that is meant"
      ),
    )
  for role, teacher, _, _ in _teachers(setup):
    if set(student.stop_ids) == set(teacher.stop_ids):
      continue
    yield Finding(
      name="stop_ids_differ",
      message=(
        f"the student stops at {_shown(student, student.stop_ids)}, the "
        f"{role} at {_shown(teacher, teacher.stop_ids)}: where they differ, "
        "the teacher finds the student's end unlikely; name the right ids in "
        "sampling.stop_ids, or choose a teacher of the same kind"
      ),
    )
  if chosen and set(chosen) != set(student.stop_ids):
    yield Finding(
      name="stop_ids_unusual",
      message=(
        f"sampling.stop_ids = {list(chosen)}, but the student's checkpoint "
        f"names {_shown(student, student.stop_ids)}; set it to None to take "
        "those"
      ),
    )
  yield from _end_of_turn(setup)
  yield from _zero_rows(setup)


def _end_of_turn(setup: Setup) -> Iterator[Finding]:
  chats = [
    name
    for name, source in setup.config.data.sources.items()
    if source.prompt.chat
  ]
  if not chats or setup.config.sampling.stop_ids == ():
    return
  end = setup.tokenizer.end_of_turn()
  if end is not None and end not in setup.stop_ids:
    yield Finding(
      name="end_of_turn_not_stop",
      message=(
        f"the chat template in {setup.tokenizer.path} ends an assistant's turn "
        f"with {_shown(setup.tokenizer, [end])}, but completions of the chat "
        f"prompts of {', '.join(chats)} end at "
        f"{_shown(setup.tokenizer, setup.stop_ids)}; add {end} to "
        "sampling.stop_ids"
      ),
    )


def _zero_rows(setup: Setup) -> Iterator[Finding]:
  if not setup.stop_ids:
    return
  path = setup.config.student.path
  rows = hf.read_output_rows(path, setup.student, setup.stop_ids)
  zero = [
    index
    for index, row in zip(setup.stop_ids, rows, strict=True)
    if not row.any()
  ]
  if zero:
    yield Finding(
      name="stop_row_zero",
      message=(
        f"the output rows of stop ids {_shown(setup.tokenizer, zero)} in "
        f"{path} are all zeros, so the student was never trained on them; "
        "train it on texts that end with one first (opd-jax sft), or name "
        "other ids in sampling.stop_ids"
      ),
    )


def _shown(tokens: Tokenizer, ids: Sequence[Any]) -> str:
  """Ids with their tokens."""
  present = [index for index in ids if index is not None]
  if not present:
    return "none"
  return ", ".join(
    f"{index} {tokens.vocabulary.get(index)!r}" for index in present
  )
