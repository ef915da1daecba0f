"""Completions of prompts by a model, drawn as in training."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from opd_jax import sampling
from opd_jax.config import SamplingConfig
from opd_jax.data import sources
from opd_jax.errors import InputError
from opd_jax.models import Model, ModelConfig
from opd_jax.templates import Prompt
from opd_jax.tokenizer import Tokenizer
from opd_jax.types import STOP_ID, Params, PromptBatch, Rollout

# A row's randomness has a number of 31 bits: the prompt's place in the lower
# ones, the sample in the upper ones.
MAX_PROMPTS = 2**20
MAX_SAMPLES = 2**11


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
  """One completion of one prompt.

  Attributes:
    prompt: its text.
    text: that the completion adds to the prompt, without special tokens.
    tokens: its ids, the stop id included.
    logprobs: nats per token, under the sampling distribution.
    stopped: by a stop id, not by the length limit.
  """

  prompt: str
  text: str
  tokens: tuple[int, ...]
  logprobs: tuple[float, ...]
  stopped: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
  """Prompts to complete, all of them checked; made by `prepare`.

  Attributes:
    prompts: texts and ids.
    tokenizer: of the model.
    sampling: how to draw, and how long.
    stop_ids: end a completion.
    vocab_size: ids that may be drawn.
    samples: completions per prompt.
    seed: of the draws.
    batch: prompts per call of the compiled sampler.
  """

  prompts: tuple[Prompt, ...]
  tokenizer: Tokenizer
  sampling: SamplingConfig
  stop_ids: tuple[int, ...]
  vocab_size: int
  samples: int
  seed: int
  batch: int


def prepare(
  prompts: Sequence[Prompt],
  names: Sequence[str],
  tokenizer: Tokenizer,
  architecture: ModelConfig,
  config: SamplingConfig,
  *,
  samples: int,
  seed: int,
  batch: int,
) -> Prompts:
  """Checks all that could go wrong, on the host.

  Args:
    prompts: to complete, at least one.
    names: of the prompts, for messages: "prompt 'Once'".
    tokenizer: of the model.
    architecture: of the model.
    config: how to draw, and how long.
    samples: completions per prompt.
    seed: of the draws; the same seed gives the same tokens.
    batch: prompts per call of the compiled sampler.

  Raises:
    InputError: an empty prompt, one too long for the model, an id it does not
      have, or a value that it rules out.
  """
  vocab_size = min(architecture.vocab_size, tokenizer.id_count)
  stop_ids = config.stop_ids
  if stop_ids is None:
    stop_ids = tokenizer.stop_ids
  sampling.check(config, stop_ids, samples, vocab_size)
  for what, count, limit in (
    ("prompts", len(prompts), MAX_PROMPTS),
    ("samples per prompt", samples, MAX_SAMPLES),
  ):
    if count > limit:
      raise InputError(f"{what} must be at most {limit:,}, got {count:,}")
  window = architecture.max_positions
  for prompt, name in zip(prompts, names, strict=True):
    length = len(prompt.ids)
    if not length:
      raise InputError(f"{name} has no token; write some text")
    sources.check_ids(prompt.ids, architecture.vocab_size, name)
    if length + config.max_new_tokens > window:
      raise InputError(
        f"{name} has {length} tokens: with max_new_tokens = "
        f"{config.max_new_tokens} it exceeds the model's window of {window} "
        "positions; shorten one of them"
      )
  return Prompts(
    prompts=tuple(prompts),
    tokenizer=tokenizer,
    sampling=config,
    stop_ids=stop_ids,
    vocab_size=vocab_size,
    samples=samples,
    seed=seed,
    batch=batch,
  )


class Generator:
  """Completes the same prompts with whatever weights it is given.

  A token depends on the weights, the prompt, the seed, the place of the prompt
  among all, the number of the sample, and its index: not on the batch, the mesh
  or how many samples there are. One program is compiled, at the first call.
  """

  def __init__(self, prompts: Prompts, model: Model):
    """Compiles nothing yet.

    Args:
      prompts: from `prepare`.
      model: in the decode layout.
    """
    self._prompts = prompts
    self._model = model
    self._compiled: Any = None
    shards = model.layout.shards("batch")
    batch = min(prompts.batch, len(prompts.prompts))
    self._batch = -(-batch // shards) * shards
    self._width = max(len(prompt.ids) for prompt in prompts.prompts)

  def __call__(self, params: Params) -> Iterator[tuple[Completion, ...]]:
    """The completions of each prompt in turn, `samples` at a time.

    All processes call it, and see all completions.

    Args:
      params: of the model, in its layout.
    """
    count = len(self._prompts.prompts)
    before: tuple[range, Rollout] | None = None
    for start in range(0, count, self._batch):
      # The last batch is filled up with its last prompt, so that the rows of
      # padding end when others do.
      picked = range(start, min(start + self._batch, count))
      padded = [*picked, *[picked[-1]] * (self._batch - len(picked))]
      drawn = self._draw(params, padded)
      # The devices draw while the host reads the batch before.
      if before is not None:
        yield from self._read(*before)
      before = picked, drawn
    if before is not None:
      yield from self._read(*before)

  def _draw(self, params: Params, picked: Sequence[int]) -> Rollout:
    tokens = np.zeros((len(picked), self._width), np.int32)
    for slot, index in enumerate(picked):
      ids = self._prompts.prompts[index].ids
      tokens[slot, : len(ids)] = ids
    lengths = np.array(
      [len(self._prompts.prompts[index].ids) for index in picked], np.int32
    )
    samples = np.arange(self._prompts.samples, dtype=np.int32)
    place = self._model.layout.place_rows
    rows = np.asarray(picked, np.int32)[:, None] + MAX_PROMPTS * samples
    batch = PromptBatch(tokens=place(tokens), lengths=place(lengths))
    arguments = (params, batch, place(rows.reshape(-1)))
    if self._compiled is None:
      self._compiled = (
        jax.jit(self._sample, out_shardings=self._model.layout.replicated())
        .lower(*arguments)
        .compile()
      )
    return self._compiled(*arguments)

  def _sample(self, params: Params, batch: PromptBatch, rows: Any) -> Rollout:
    prompts = self._prompts
    return sampling.sample(
      self._model,
      params,
      batch,
      config=prompts.sampling,
      stop_ids=prompts.stop_ids,
      rollouts=prompts.samples,
      key=jax.random.key(prompts.seed),
      vocab_size=prompts.vocab_size,
      rows=rows,
    )

  def _read(
    self, picked: range, rollout: Rollout
  ) -> Iterator[tuple[Completion, ...]]:
    rollout = jax.device_get(rollout)
    samples = self._prompts.samples
    for slot, index in enumerate(picked):
      prompt = self._prompts.prompts[index]
      yield tuple(
        self._completion(prompt, rollout, row)
        for row in range(slot * samples, (slot + 1) * samples)
      )

  def _completion(
    self, prompt: Prompt, rollout: Rollout, row: int
  ) -> Completion:
    mask = np.asarray(rollout.sampled_mask[row])
    drawn = np.asarray(rollout.tokens[row])[mask].tolist()
    return Completion(
      prompt=prompt.text,
      text=self._prompts.tokenizer.decode_after(prompt.ids, drawn),
      tokens=tuple(drawn),
      logprobs=tuple(np.asarray(rollout.behavior_logprobs[row])[mask].tolist()),
      stopped=bool(rollout.stop_reason[row] == STOP_ID),
    )
