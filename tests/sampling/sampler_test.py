"""The decode loop against rescoring in numpy; what must not matter to it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.config import SamplingConfig
from opd_jax.errors import InputError
from opd_jax.sampling import sample
from opd_jax.types import STOP_ID, STOP_LENGTH, PromptBatch

VOCAB, COLUMNS, WIDTH = 50, 128, 8
KEY = jax.random.key(0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ToyCache:
  tokens: jax.Array
  positions: jax.Array

  def repeat(self, n):
    return jax.tree.map(lambda x: jnp.repeat(x, n, axis=0), self)


@dataclasses.dataclass(frozen=True)
class Toy:
  """Hidden state: a sum over what attention may see, weighted by distance."""

  traces: list = dataclasses.field(default_factory=list, hash=False)
  decoded: list | None = dataclasses.field(default=None, hash=False)

  def _hidden(self, params, cache, positions):
    seen = (cache.positions >= 0) & (cache.positions <= positions[:, None])
    weights = jnp.where(seen, jnp.cos(positions[:, None] - cache.positions), 0)
    return jnp.einsum(
      "bs,bsd->bd", weights, jnp.asarray(params["embedding"])[cache.tokens]
    )

  def prefill(self, params, tokens, positions, slots):
    self.traces.append(slots)
    empty = ((0, 0), (0, slots - tokens.shape[1]))
    cache = ToyCache(
      jnp.pad(tokens, empty), jnp.pad(positions, empty, constant_values=-1)
    )
    return self._hidden(params, cache, positions[:, -1]), cache

  def decode(self, params, cache, tokens, positions, slot):
    if self.decoded is not None:
      record = lambda *call: self.decoded.append(jax.tree.map(np.asarray, call))
      jax.debug.callback(record, slot, positions, ordered=True)
    update = lambda buffer, column: jax.lax.dynamic_update_slice_in_dim(
      buffer, column[:, None], slot, axis=1
    )
    cache = ToyCache(
      update(cache.tokens, tokens), update(cache.positions, positions)
    )
    return self._hidden(params, cache, positions), cache

  def logits(self, params, hidden):
    return hidden @ params["head"]


PARAMS = {
  "embedding": np.random.default_rng(0)
  .normal(size=(VOCAB, WIDTH), scale=0.4)
  .astype(np.float32),
  # Columns beyond the vocabulary would win if they were not masked.
  "head": np.random.default_rng(1)
  .normal(size=(WIDTH, COLUMNS))
  .astype(np.float32)
  + np.where(np.arange(COLUMNS) < VOCAB, 0, 9).astype(np.float32),
}
TOY = Toy()


def rescore(prompt, completion):
  """Log-probabilities [T, VOCAB] of one row, by the definition, no cache."""
  ids = np.concatenate([prompt, completion])
  result = []
  for t in range(len(completion)):
    last = len(prompt) + t - 1
    weights = np.cos(last - np.arange(last + 1))
    hidden = weights @ PARAMS["embedding"][ids[: last + 1]].astype(np.float64)
    logits = hidden @ PARAMS["head"][:, :VOCAB]
    result.append(logits - np.logaddexp.reduce(logits))
  return np.array(result)


def batch(prompts, slots=6):
  tokens = np.zeros((len(prompts), slots), np.int32)
  for row, prompt in zip(tokens, prompts, strict=True):
    row[: len(prompt)] = prompt
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  return PromptBatch(tokens=jnp.asarray(tokens), lengths=jnp.asarray(lengths))


PROMPTS = [[3, 1, 4, 1, 5, 9], [2], [6, 5, 3], [0, 0, 7, 8]]


STOPS = (0, 3)  # The first is also the pad.


@functools.partial(jax.jit, static_argnames="rollouts")
def default(prompts, rollouts=2, rows=None, key=KEY):
  """Up to 12 tokens of the unfiltered distribution."""
  return sample(
    TOY,
    PARAMS,
    prompts,
    config=SamplingConfig(max_new_tokens=12),
    stop_ids=STOPS,
    rollouts=rollouts,
    key=key,
    rows=rows,
    vocab_size=VOCAB,
  )


def draw(stop_ids=(), toy=TOY, rows=None, **config):
  """One rollout of each prompt."""
  return jax.jit(
    lambda prompts: sample(
      toy,
      PARAMS,
      prompts,
      config=SamplingConfig(**config),
      stop_ids=stop_ids,
      rollouts=1,
      key=KEY,
      rows=rows,
      vocab_size=VOCAB,
    )
  )(batch(PROMPTS))


def completions(rollout):
  """(prompt, completion, behavior logprobs) of each row, by the masks."""
  lengths = np.asarray(rollout.sampled_mask).sum(axis=1)
  for b, length in enumerate(lengths):
    prompt = rollout.prompts.tokens[b, : rollout.prompts.lengths[b]]
    yield (
      np.asarray(prompt),
      np.asarray(rollout.tokens[b, :length]),
      np.asarray(rollout.behavior_logprobs[b, :length]),
    )


def test_rows_end_at_their_stop_id_and_rescore_to_the_behavior():
  rollout = default(batch(PROMPTS))
  mask = np.asarray(rollout.sampled_mask)
  lengths = mask.sum(axis=1)
  assert 1 in lengths
  assert 12 in lengths
  for b, (prompt, completion, logprobs) in enumerate(completions(rollout)):
    assert prompt.tolist() == PROMPTS[b // 2]
    stops = np.isin(completion, STOPS)
    assert not stops[:-1].any()
    assert rollout.stop_reason[b] == (STOP_ID if stops[-1] else STOP_LENGTH)
    assert stops[-1] or len(completion) == 12
    expected = rescore(prompt, completion)[range(len(completion)), completion]
    np.testing.assert_allclose(logprobs, expected, atol=1e-5)
  np.testing.assert_array_equal(
    mask, np.arange(12) < lengths[:, None], "masks come from lengths"
  )
  assert not np.asarray(rollout.tokens)[~mask].any()
  assert not np.asarray(rollout.behavior_logprobs)[~mask].any()


def test_drawn_tokens_invert_the_rescored_distribution():
  # The whole chain by hand: uniform of (key, row, t) against the row's CDF.
  rollout = draw(max_new_tokens=5, rows=jnp.array([7, 0, 3, 10**9]))
  for row, (prompt, completion, _) in zip(
    (7, 0, 3, 10**9), completions(rollout), strict=True
  ):
    cdf = np.cumsum(np.exp(rescore(prompt, completion)), axis=1)
    for t, token in enumerate(completion):
      key = jax.random.fold_in(jax.random.fold_in(KEY, row), t)
      assert token == np.sum(cdf[t] <= jax.random.uniform(key))


def test_greedy_is_the_argmax_of_rescoring():
  rollout = draw(max_new_tokens=10, temperature=0.0, top_k=5)
  for prompt, completion, logprobs in completions(rollout):
    expected = rescore(prompt, completion)
    np.testing.assert_array_equal(completion, expected.argmax(axis=1))
    np.testing.assert_allclose(logprobs, expected.max(axis=1), atol=1e-5)


def test_behavior_is_the_filtered_distribution():
  rollout = draw(max_new_tokens=6, temperature=0.7, top_k=3)
  for prompt, completion, logprobs in completions(rollout):
    scores = rescore(prompt, completion) / 0.7
    scores[scores < np.sort(scores, axis=1)[:, -3:-2]] = -np.inf
    scores -= np.logaddexp.reduce(scores, axis=1)[:, None]
    expected = scores[range(len(completion)), completion]
    np.testing.assert_allclose(logprobs, expected, atol=1e-5)


def test_a_row_depends_on_its_prompt_and_number_only():
  # Other batch mates in another order, wider padding, no shared prefill.
  whole = default(batch(PROMPTS))
  order = np.array([5, 4, 0, 7, 1])
  other = default(
    batch([PROMPTS[row // 2] for row in order], slots=9),
    rollouts=1,
    rows=jnp.asarray(order),
  )
  for name in ("tokens", "sampled_mask", "stop_reason"):
    np.testing.assert_array_equal(
      getattr(other, name), np.asarray(getattr(whole, name))[order], name
    )
  np.testing.assert_allclose(
    other.behavior_logprobs,
    np.asarray(whole.behavior_logprobs)[order],
    atol=1e-6,
  )
  for rollouts in np.asarray(whole.tokens).reshape(len(PROMPTS), 2, -1):
    assert not np.array_equal(*rollouts)


def test_the_loop_ends_with_its_longest_row():
  everything = tuple(range(VOCAB))
  for stop_ids, length in ((everything, 7), ((), 1), ((0, 3, 11), 40)):
    toy = Toy(decoded=[])
    rollout = draw(stop_ids=stop_ids, toy=toy, max_new_tokens=length)
    jax.effects_barrier()
    lengths = np.asarray(rollout.sampled_mask).sum(axis=1)
    longest = lengths.max()
    if len(stop_ids) == VOCAB:
      assert longest == 1
      assert np.all(rollout.stop_reason == STOP_ID)
    elif not stop_ids:
      assert longest == length
      assert np.all(rollout.stop_reason == STOP_LENGTH)
    else:
      assert longest < length
    # The last token is drawn, but never decoded; slots follow the prompts'.
    # A row that has ended writes position -1.
    assert [int(slot) for slot, _ in toy.decoded] == [*range(6, 5 + longest)]
    for t, (_, positions) in enumerate(toy.decoded):
      starts = np.array([len(prompt) for prompt in PROMPTS])
      np.testing.assert_array_equal(
        positions, np.where(t + 1 < lengths, starts + t, -1)
      )


def test_one_compilation_serves_every_key_and_prompt():
  first = default(batch(PROMPTS), key=jax.random.key(2))
  traces = len(TOY.traces)
  other = default(batch(PROMPTS[::-1]), key=jax.random.key(1))
  assert len(TOY.traces) == traces
  assert not np.array_equal(first.tokens, other.tokens)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"config": SamplingConfig(top_k=51)}, r"top_k must be in \[1, V=50\]"),
    ({"stop_ids": (3, 50)}, "stop id 50 can never be drawn"),
    ({"stop_ids": (-1,)}, "stop id -1 can never be drawn"),
    ({"rollouts": 0}, "rollouts per prompt must be >= 1, got 0"),
    ({"vocab_size": 129}, "at most the decoder's 128 columns, got 129"),
  ],
)
def test_impossible_requests_are_refused(change, message):
  arguments = {
    "config": SamplingConfig(),
    "stop_ids": (),
    "rollouts": 1,
    "key": KEY,
    "vocab_size": VOCAB,
  }
  with pytest.raises(InputError, match=message):
    jax.eval_shape(
      lambda: sample(TOY, PARAMS, batch(PROMPTS), **arguments | change)
    )
