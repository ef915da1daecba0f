"""Text to ids and back, and whether two models speak the same ids.

The only importer of transformers, inside functions: the import takes seconds.
Tokenizers are read from a folder, on this machine or in a bucket; no code of
the checkpoint is run.
"""

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from opd_jax import storage
from opd_jax.errors import InputError
from opd_jax.imports import without_torch
from opd_jax.storage import AnyPath

_TOKENIZER_FILES = (
  "tokenizer.json",
  "tokenizer.model",
  "vocab.json",
  "vocab.txt",
)
_SPECIAL = ("bos", "eos", "pad", "unk")
_PROBES = (
  "The quick brown fox jumps over the lazy dog.",
  "  two  spaces,\n\ta newline, a tab",
  "3.14159 * (x + 2) ** 2 != 10",
  "Ünïcödé “quotes” – 你好, мир 🙂",
)
_EXAMPLES = 5


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
  """The tokenizer of a checkpoint; made by `load`.

  Attributes:
    path: the folder it was read from.
    vocabulary: the token of every id, added tokens included.
    special_ids: (name, id) of bos, eos, pad and unk; None where there is none.
    stop_ids: ids that end a completion: `eos_token_id` of
      generation_config.json, then the tokenizer's eos, each once.
  """

  path: AnyPath
  vocabulary: dict[int, str]
  special_ids: tuple[tuple[str, int | None], ...]
  stop_ids: tuple[int, ...]
  _backend: Any

  @property
  def id_count(self) -> int:
    """One more than the largest id."""
    return max(self.vocabulary) + 1

  def fingerprint(self) -> str:
    """SHA-256 over all that decides the ids of a text.

    The vocabulary, the special ids, and of a fast tokenizer its whole
    tokenizer.json: merges, normaliser, added tokens, what is put around a text.
    """
    fast = getattr(self._backend, "backend_tokenizer", None)
    rules = {} if fast is None else json.loads(fast.to_str())
    for transient in ("truncation", "padding"):
      rules.pop(transient, None)
    parts = [sorted(self.vocabulary.items()), self.special_ids, rules]
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()

  def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
    """Ids of a text, with the special tokens this tokenizer adds by itself.

    Args:
      text: to encode; special tokens written in it become their ids.
      special_tokens: false adds none.
    """
    return list(
      self._backend(text, verbose=False, add_special_tokens=special_tokens)[
        "input_ids"
      ]
    )

  def chat(
    self,
    messages: Sequence[Mapping[str, str]],
    *,
    thinking: bool | None = None,
  ) -> str:
    """The chat template's text of messages, up to the assistant's turn.

    Args:
      messages: {"role", "content"} each.
      thinking: the template's `enable_thinking`; None leaves it out.

    Raises:
      InputError: no chat template, one that refuses the messages, or one
        without the switch that `thinking` sets.
    """
    if not self.has_chat_template:
      raise InputError(
        f"the tokenizer in {self.path} has no chat template; set prompt.chat "
        "to False and write the prompt's whole text in prompt.text, or add a "
        "chat_template.jinja to that folder"
      )
    template = str(self._backend.chat_template)
    if thinking is not None and "enable_thinking" not in template:
      raise InputError(
        f"prompt.thinking = {thinking}, but the chat template in {self.path} "
        "has no switch enable_thinking; set prompt.thinking to None"
      )
    import jinja2

    options = {} if thinking is None else {"enable_thinking": thinking}
    try:
      return self._backend.apply_chat_template(
        [dict(message) for message in messages],
        tokenize=False,
        add_generation_prompt=True,
        **options,
      )
    except jinja2.TemplateError as error:
      raise InputError(
        f"the chat template in {self.path} refuses the messages with roles "
        f"{[message['role'] for message in messages]}: {error}; see what the "
        "template allows"
      ) from error

  @property
  def has_chat_template(self) -> bool:
    """Whether `chat` works."""
    return bool(self._backend.chat_template)

  def end_of_turn(self) -> int | None:
    """The special id that the chat template puts behind an assistant's turn.

    None where it puts none there, or cannot render such a dialogue.
    """
    import jinja2

    if not self.has_chat_template:
      return None
    answer = "opd_jax answer"
    messages = [
      {"role": "user", "content": "opd_jax question"},
      {"role": "assistant", "content": answer},
    ]
    try:
      text = self._backend.apply_chat_template(messages, tokenize=False)
    except jinja2.TemplateError:
      return None
    if answer not in text:
      return None
    behind = self.encode(text.rpartition(answer)[2], special_tokens=False)
    special = set(self._backend.added_tokens_decoder)
    special.discard(self._backend.unk_token_id)
    return next((index for index in behind if index in special), None)

  def decode(
    self, ids: Iterable[int], *, skip_special_tokens: bool = True
  ) -> str:
    """Text of ids."""
    return self._backend.decode(
      list(ids),
      skip_special_tokens=skip_special_tokens,
      clean_up_tokenization_spaces=False,
    )

  def decode_after(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The text that ids add to a prompt's, a space between them included.

    Many tokenizers drop the space of a text's first word, which `decode` of a
    completion alone would do.
    """
    before, whole = self.decode(prompt), self.decode([*prompt, *ids])
    # A prompt cut inside a character ends with another one than it becomes.
    shared = itertools.takewhile(
      lambda pair: pair[0] == pair[1], zip(before, whole, strict=False)
    )
    return whole[len(list(shared)) :]


def load(path: str | AnyPath) -> Tokenizer:
  """Reads the tokenizer in a checkpoint's folder, which may be in a bucket.

  Raises:
    InputError: no folder, no tokenizer in it, or one that cannot be read.
  """
  path = storage.to_path(path)
  folder = storage.local_copy(path)
  if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
    raise InputError(
      f"no tokenizer in {path}: expected one of {', '.join(_TOKENIZER_FILES)}; "
      "copy the tokenizer files of the checkpoint into that folder"
    )
  # It would advise to install torch, which tokenizers do not need.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  with without_torch("transformers"):
    from transformers import AutoTokenizer

  try:
    backend: Any = AutoTokenizer.from_pretrained(
      str(folder), local_files_only=True, trust_remote_code=False
    )
  except (ImportError, KeyError, OSError, ValueError) as error:
    raise InputError(
      f"cannot read the tokenizer in {path}: {error}; download the checkpoint "
      "again, or convert it to a tokenizer.json that needs no custom code"
    ) from error
  special = tuple(
    (name, getattr(backend, f"{name}_token_id")) for name in _SPECIAL
  )
  stop_ids = _generation_stop_ids(folder)
  if backend.eos_token_id is not None:
    stop_ids = (*stop_ids, backend.eos_token_id)
  return Tokenizer(
    path=path,
    vocabulary={index: token for token, index in backend.get_vocab().items()},
    special_ids=special,
    stop_ids=tuple(dict.fromkeys(stop_ids)),
    _backend=backend,
  )


def _generation_stop_ids(path: Path) -> tuple[int, ...]:
  file = path / "generation_config.json"
  if not file.is_file():
    return ()
  try:
    value = json.loads(file.read_bytes()).get("eos_token_id")
  except (ValueError, AttributeError) as error:
    raise InputError(
      f"{file} is not a JSON object: {error}; restore it, or delete it to stop "
      "at the tokenizer's own end-of-sequence id"
    ) from error
  ids = value if isinstance(value, list) else [] if value is None else [value]
  if not all(type(index) is int and index >= 0 for index in ids):
    raise InputError(
      f"eos_token_id in {file} must be an id or a list of ids, got {value!r}; "
      "correct the file"
    )
  return tuple(ids)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
  """How the ids of two tokenizers differ, student first.

  Attributes:
    ids: how many ids stand for different tokens, counting an id that only one
      of the two knows unless it lies beyond the last id of the other.
    examples: the first of them: (id, student token, teacher token).
    student_extra: ids of the student beyond the teacher's last one.
    teacher_extra: ids of the teacher beyond the student's last one.
    special_ids: (name, student id, teacher id) of special tokens that differ.
    probes: texts that are encoded differently.
  """

  ids: int
  examples: tuple[tuple[int, str | None, str | None], ...]
  student_extra: int
  teacher_extra: int
  special_ids: tuple[tuple[str, int | None, int | None], ...]
  probes: tuple[str, ...]


def compare(
  student: Tokenizer, teacher: Tokenizer, probes: Sequence[str] = _PROBES
) -> Difference:
  """Compares two tokenizers id by id, and on a few texts."""
  shared = min(student.id_count, teacher.id_count)
  pairs = (
    (index, student.vocabulary.get(index), teacher.vocabulary.get(index))
    for index in range(shared)
  )
  differing = [pair for pair in pairs if pair[1] != pair[2]]
  return Difference(
    ids=len(differing),
    examples=tuple(differing[:_EXAMPLES]),
    student_extra=sum(index >= shared for index in student.vocabulary),
    teacher_extra=sum(index >= shared for index in teacher.vocabulary),
    special_ids=tuple(
      (name, ours, theirs)
      for (name, ours), (_, theirs) in zip(
        student.special_ids, teacher.special_ids, strict=True
      )
      if ours != theirs
    ),
    probes=tuple(
      text for text in probes if student.encode(text) != teacher.encode(text)
    ),
  )


def explain(
  student: Tokenizer,
  teacher: Tokenizer,
  difference: Difference,
  role: str = "teacher",
) -> str | None:
  """Why a teacher cannot score the student's ids; None if it can.

  The other frozen models are teachers here, of another `role`.

  Extra ids beyond the other's last one (padding rows) and different special
  ids (a base model and its chat version) are no obstacle.
  """
  names = f"student {student.path} and {role} {teacher.path}"
  remedy = (
    f"choose a {role} of the student's tokenizer family: its scores are about "
    "the student's ids"
  )
  encoded = ""
  if difference.probes:
    text = difference.probes[0]
    encoded = (
      f"encode {text!r} as {student.encode(text)[:8]} and "
      f"{teacher.encode(text)[:8]} (first 8 ids)"
    )
  if difference.ids:
    shown = ", ".join(
      f"{index}: {ours!r} / {theirs!r}"
      for index, ours, theirs in difference.examples
    )
    return (
      f"the tokenizers of {names} differ in {difference.ids} of "
      f"{min(student.id_count, teacher.id_count)} ids; the first are {shown}; "
      f"{'they ' + encoded + '; ' if encoded else ''}{remedy}"
    )
  if encoded:
    return (
      f"the tokenizers of {names} have the same ids but {encoded}; {remedy}"
    )
  return None
