"""Completions of prompts by a checkpoint, drawn as in training."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import sampling, tokenizer
from opd_jax.config import SamplingConfig
from opd_jax.data import sources
from opd_jax.errors import InputError
from opd_jax.models import Model, ModelConfig, hf
from opd_jax.sharding import DECODE_RULES, Layout, make_mesh
from opd_jax.types import STOP_ID, PromptBatch


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


def generate(
  path: str,
  prompts: Sequence[str],
  config: SamplingConfig,
  *,
  samples: int = 1,
  seed: int = 0,
  compute_dtype: str = "float32",
  tensor: int = 1,
) -> list[Completion]:
  """Draws completions; those of a prompt follow each other.

  Args:
    path: a folder, or `org/name[@revision]` in the Hugging Face cache.
    prompts: texts, encoded as the tokenizer does by itself.
    config: how to draw, and how long.
    samples: completions per prompt.
    seed: of the draws; the same seed gives the same tokens.
    compute_dtype: of weights and activations.
    tensor: devices the model is spread over.

  Raises:
    InputError: bad checkpoint, empty prompt, a prompt too long, a value the
      model or the devices rule out; nothing was placed on a device.
  """
  architecture = hf.read_config(path)
  hf.check(path, architecture)
  tokens = tokenizer.load(hf.resolve(path))
  stop_ids = config.stop_ids
  if stop_ids is None:
    stop_ids = tokens.stop_ids
  vocab_size = min(architecture.vocab_size, tokens.id_count)
  sampling.check(config, stop_ids, samples, vocab_size)
  ids = _encode(prompts, tokens, config, architecture)
  available = len(jax.devices())
  if not 1 <= tensor <= available:
    raise InputError(
      f"tensor must be in [1, {available}] (the devices here), got {tensor}"
    )
  mesh = make_mesh({"tensor": tensor}, jax.devices()[:tensor])
  model = Model(architecture, Layout.create(mesh, DECODE_RULES), compute_dtype)
  model.abstract_params()
  params = hf.load(path, model, compute_dtype)
  draw = jax.jit(
    lambda params, batch: sampling.sample(
      model,
      params,
      batch,
      config=config,
      stop_ids=stop_ids,
      rollouts=samples,
      key=jax.random.key(seed),
      vocab_size=vocab_size,
    )
  )
  rollout = jax.device_get(draw(params, _batch(ids)))
  completions = []
  for row, mask in enumerate(rollout.sampled_mask):
    drawn = rollout.tokens[row][mask].tolist()
    completions.append(
      Completion(
        prompt=prompts[row // samples],
        text=tokens.decode_after(ids[row // samples], drawn),
        tokens=tuple(drawn),
        logprobs=tuple(rollout.behavior_logprobs[row][mask].tolist()),
        stopped=bool(rollout.stop_reason[row] == STOP_ID),
      )
    )
  return completions


def _encode(
  prompts: Sequence[str],
  tokens: tokenizer.Tokenizer,
  config: SamplingConfig,
  architecture: ModelConfig,
) -> list[list[int]]:
  window = architecture.max_positions
  ids = [tokens.encode(prompt) for prompt in prompts]
  for prompt, found in zip(prompts, ids, strict=True):
    if not found:
      raise InputError(f"prompt {prompt!r} has no token; write some text")
    sources.check_ids(found, architecture.vocab_size, f"prompt {prompt[:40]!r}")
    if len(found) + config.max_new_tokens > window:
      raise InputError(
        f"a prompt of {len(found)} tokens and max_new_tokens = "
        f"{config.max_new_tokens} exceed the model's window of {window} "
        f"positions: {prompt[:40]!r}; shorten one of them"
      )
  return ids


def _batch(ids: Sequence[Sequence[int]]) -> PromptBatch:
  width = max(map(len, ids))
  padded = np.zeros((len(ids), width), np.int32)
  for row, found in enumerate(ids):
    padded[row, : len(found)] = found
  return PromptBatch(
    tokens=jnp.asarray(padded),
    lengths=jnp.asarray([len(found) for found in ids], jnp.int32),
  )
