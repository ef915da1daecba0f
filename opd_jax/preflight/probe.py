"""Does the student end its completions? The only part that loads weights."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from opd_jax import sampling
from opd_jax.models import hf
from opd_jax.preflight import prompts
from opd_jax.preflight.report import Finding, Section
from opd_jax.scoring import Scorer
from opd_jax.setup import Setup
from opd_jax.step import Step
from opd_jax.types import (
  MASKED_LOGPROB,
  STOP_ID,
  Params,
  PromptBatch,
  Rollout,
  StepInputs,
)

PROMPTS = 16
MOST_TOKENS = 256
# A cut completion tells nothing unless fewer than this many stops would be
# expected of it at its full length.
_EXPECTED = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ends:
  """How the sampled completions ended.

  Attributes:
    samples: completions.
    stopped: of them, by a stop id.
    length: tokens each could have.
    full_length: tokens that the run would give it.
    mean_length: tokens they had, the stop id included.
    stop_probability: of the stop ids together, mean over all drawn tokens, at
      the run's temperature and before its filters.
  """

  samples: int
  stopped: int
  length: int
  full_length: int
  mean_length: float
  stop_probability: float


def inspect(setup: Setup, step: Step) -> Section:
  """Loads the student, samples a few completions, looks at their ends."""
  ends, rollout = sample(setup, step)
  first = np.asarray(rollout.tokens[0])[np.asarray(rollout.sampled_mask[0])]
  example = prompts.examples(setup, 1)[0]
  ids = [int(index) for index in first]
  text = setup.tokenizer.decode(ids, skip_special_tokens=False)
  lines = (
    f"{ends.stopped} of {ends.samples} completions of at most {ends.length} "
    f"tokens ended at a stop id, after {ends.mean_length:.1f} tokens on "
    "average, cut ones included",
    f"probability of the stop ids, mean over all drawn tokens: "
    f"{ends.stop_probability:.2g}",
    f"the first completion: {text!r}",
    "",
    *prompts.boundary(setup, example, ids),
  )
  return Section(
    title="probe",
    lines=lines,
    figures=dataclasses.asdict(ends),
    findings=findings(setup, ends),
  )


def findings(setup: Setup, ends: Ends) -> tuple[Finding, ...]:
  """Whether the student can end a completion at all."""
  if ends.stopped or not setup.stop_ids:
    return ()
  expected = ends.stop_probability * ends.full_length
  cut = ends.length < ends.full_length
  told = ", ".join(
    f"{index} {setup.tokenizer.vocabulary.get(index)!r}"
    for index in setup.stop_ids
  )
  seen = (
    f"none of {ends.samples} completions of {ends.length} tokens ended at a "
    f"stop id ({told}), whose mean probability is {ends.stop_probability:.2g}"
  )
  if cut and expected >= _EXPECTED:
    return (
      Finding(
        name="eos_unclear",
        message=(
          f"{seen}; at sampling.max_new_tokens = {ends.full_length} some may: "
          "look at rollout/truncated in the first records of the run"
        ),
      ),
    )
  return (
    Finding(
      name="eos_never_drawn",
      message=(
        f"{seen}; train the student on texts that end with one first (opd-jax "
        "sft puts one behind each), name the ids it does end with in "
        f"sampling.stop_ids, raise sampling.max_new_tokens = "
        f"{ends.full_length}, or set sampling.stop_ids to () if completions "
        "are meant to be cut"
      ),
    ),
  )


def sample(setup: Setup, step: Step) -> tuple[Ends, Rollout]:
  """Draws a completion of each of the first prompts, as the run would."""
  config = setup.config
  length = min(config.sampling.max_new_tokens, MOST_TOKENS)
  batch = _prompts(setup)
  count = batch.lengths.shape[0]
  model = step.decoder
  drawn = dataclasses.replace(config.sampling, max_new_tokens=length)
  scorer = Scorer(
    student=model,
    vocab_size=setup.vocab_size,
    temperature=step.scorer.temperature,
    chunk_tokens=step.scorer.chunk_tokens,
  )

  def run(params: Params, batch: PromptBatch) -> tuple[Rollout, Array]:
    rollout = sampling.sample(
      model,
      params,
      batch,
      config=drawn,
      stop_ids=setup.stop_ids,
      rollouts=1,
      key=jax.random.key(config.seed),
      vocab_size=setup.vocab_size,
    )
    rows = step.scoring_batch(rollout, StepInputs(prompts=batch))
    states = scorer.hidden("student", params, rows)
    stop = _stop_probability(scorer, setup.stop_ids, params, states)
    mask = rollout.sampled_mask
    return rollout, jnp.sum(jnp.where(mask, stop, 0.0)) / jnp.sum(mask)

  params = hf.load(config.student.path, model, model.compute_dtype)
  rollout, probability = jax.device_get(jax.jit(run)(params, batch))
  return Ends(
    samples=count,
    stopped=int(np.sum(rollout.stop_reason == STOP_ID)),
    length=length,
    full_length=config.sampling.max_new_tokens,
    mean_length=float(np.mean(np.sum(rollout.sampled_mask, axis=1))),
    stop_probability=float(probability),
  ), rollout


def _prompts(setup: Setup) -> PromptBatch:
  """The first prompts of the sources in turn, cut as the run does."""
  window = setup.config.data.max_prompt_tokens
  of_source: dict[str, list[tuple[int, ...]]] = {}
  for example in prompts.examples(setup, PROMPTS):
    of_source.setdefault(example.source, []).append(example.student.ids)
  turns = itertools.zip_longest(*of_source.values())
  ids = [row for turn in turns for row in turn if row][:PROMPTS]
  tokens = np.zeros((len(ids), window), np.int32)
  for slot, row in enumerate(ids):
    tokens[slot, : len(row)] = row
  return PromptBatch(
    tokens=jnp.asarray(tokens),
    lengths=jnp.asarray([len(row) for row in ids], jnp.int32),
  )


def _stop_probability(
  scorer: Scorer,
  stop_ids: tuple[int, ...],
  params: Params,
  states: Float[Array, "B T D"],
) -> Float[Array, "B T"]:
  """Mass of the stop ids before each drawn token, a token at a time."""

  def mass(states: Float[Array, "B D"]) -> Float[Array, " B"]:
    logits = scorer.student.logits(params, states) / scorer.temperature
    columns = jnp.arange(logits.shape[-1])
    logits = jnp.where(columns < scorer.vocab_size, logits, MASKED_LOGPROB)
    stops = jnp.isin(columns, jnp.array(stop_ids, jnp.int32))
    return jnp.sum(jnp.where(stops, jax.nn.softmax(logits), 0.0), axis=-1)

  return jax.lax.map(mass, states.swapaxes(0, 1)).swapaxes(0, 1)
