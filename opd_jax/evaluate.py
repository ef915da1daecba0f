"""Evaluation by sampled answers: how often is a model right?"""

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float

from opd_jax import estimates, generate, processes, templates, verifiers
from opd_jax.config import EvalConfig, SamplingConfig, TemplateConfig
from opd_jax.data import sources
from opd_jax.errors import InputError
from opd_jax.estimates import Interval
from opd_jax.generate import Completion, Generator
from opd_jax.models import Model, ModelConfig
from opd_jax.tokenizer import Tokenizer
from opd_jax.types import Params
from opd_jax.verifiers import Verifier

# The completions of one problem.
Drawn = tuple[Completion, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problems:
  """What is asked, and what is right; made by `prepare`.

  Attributes:
    config: of the evaluation.
    prompts: of the problems, and how to complete them.
    answers: that the verifier gets, one per problem.
    names: of the rows, for messages.
    verifier: says what is right.
  """

  config: EvalConfig
  prompts: generate.Prompts
  answers: tuple[str, ...]
  names: tuple[str, ...]
  verifier: Verifier


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
  """A mean over problems.

  Attributes:
    value: in [0, 1].
    interval: 95 %, for problems of this kind; see `estimates.interval`.
  """

  value: float
  interval: Interval


def prepare(
  config: EvalConfig,
  sampling: SamplingConfig,
  tokenizer: Tokenizer,
  architecture: ModelConfig,
  template: TemplateConfig | None = None,
) -> Problems:
  """Reads and checks all that an evaluation needs, on the host.

  The verifier is tried on two completions of every problem: nothing, and the
  answer itself.

  Args:
    config: what to evaluate on; its source is set.
    sampling: how to draw where the config does not say.
    tokenizer: of the model.
    architecture: of the model.
    template: of the prompts, in place of the source's own: a teacher's.

  Raises:
    InputError: bad source, template, verifier or prompt.
  """
  if config.source is None:
    raise ValueError("eval.source is None: there is nothing to evaluate on")
  source = config.source
  verifier = verifiers.load(config.verifier)
  prompts, answers, names = [], [], []
  for index, row in enumerate(sources.read(source)):
    where = sources.where(source, index)
    names.append(where)
    prompts.append(
      templates.prompt(template or source.prompt, row, tokenizer, where)
    )
    answers.append(templates.fill(source.answer, row, where))

  def attempt() -> None:
    # What fails here would otherwise fail after hours of training.
    for answer, where in zip(answers, names, strict=True):
      for text in ("", answer):
        verifier.score(text, answer, where)
        if verifier.vote is not None:
          verifier.vote_of(text, where)

  processes.from_first(attempt)
  if not prompts:
    raise InputError(
      f"{source.path} has no rows to evaluate on; name another source or split"
    )
  return Problems(
    config=config,
    prompts=generate.prepare(
      prompts,
      [f"the prompt of {name}" for name in names],
      tokenizer,
      architecture,
      config.sampling or sampling,
      samples=config.samples,
      seed=config.seed,
      batch=config.batch,
    ),
    answers=tuple(answers),
    names=tuple(names),
    verifier=verifier,
  )


def of_run(
  config: EvalConfig,
  sampling: SamplingConfig,
  tokenizer: Tokenizer,
  architecture: ModelConfig,
  template: TemplateConfig | None = None,
) -> Problems | None:
  """As `prepare`, or None if the evaluation is switched off."""
  if config.source is None:
    return None
  return prepare(config, sampling, tokenizer, architecture, template)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Report:
  """What became of the problems.

  Attributes:
    problems: what was asked.
    completions: `samples` per problem.
    scores: of the verifier, in [0, 1].
    votes: for the majority: the number of the first sample of the problem that
      gives the same answer, None for no answer; None if nobody votes.
  """

  problems: Problems
  completions: tuple[Drawn, ...]
  scores: Float[np.ndarray, "N k"]
  votes: tuple[tuple[int | None, ...], ...] | None

  @property
  def right(self) -> Bool[np.ndarray, "N k"]:
    """The samples of full score."""
    return self.scores == 1

  def estimates(self) -> dict[str, Estimate]:
    """avg@k, pass@k and maj@k by name; maj@k where the verifier can vote."""
    config = self.problems.config
    samples = config.samples
    values = {f"avg@{samples}": (self.scores.mean(axis=1), 1)}
    for k in _pass_at(config):
      values[f"pass@{k}"] = estimates.pass_at(self.right, k), k
    if self.votes is not None:
      majority = estimates.majority_at(self.votes, self.right, samples)
      values[f"maj@{samples}"] = majority, samples
    return {
      name: Estimate(
        value=float(np.mean(found)),
        interval=estimates.interval(found, samples / k),
      )
      for name, (found, k) in values.items()
    }

  def metrics(self) -> dict[str, float]:
    """For the log.

    `eval/accuracy` is avg@k, the mean score; `eval/accuracy_low` and
    `eval/accuracy_high` are its interval; then `eval/pass_at_K` and
    `eval/maj_at_K`; `eval/truncated` is the fraction that ran into the length
    limit, `eval/length_mean` in tokens, stop ids included.
    """
    (_, accuracy), *others = self.estimates().items()
    metrics = {
      "eval/accuracy": accuracy.value,
      "eval/accuracy_low": accuracy.interval.low,
      "eval/accuracy_high": accuracy.interval.high,
    }
    for name, estimate in others:
      metrics[f"eval/{name.replace('@', '_at_')}"] = estimate.value
    drawn = [one for group in self.completions for one in group]
    truncated = [not one.stopped for one in drawn]
    metrics["eval/truncated"] = float(np.mean(truncated))
    metrics["eval/length_mean"] = float(
      np.mean([len(one.tokens) for one in drawn])
    )
    return metrics

  def rows(self) -> Iterator[Mapping[str, Any]]:
    """Each problem with its completions, as JSON."""
    for prompt, answer, completions, scores in zip(
      self.problems.prompts.prompts,
      self.problems.answers,
      self.completions,
      self.scores.tolist(),
      strict=True,
    ):
      yield {
        "prompt": prompt.text,
        "answer": answer,
        "completions": [
          {
            "text": one.text,
            "score": score,
            "stopped": one.stopped,
            "tokens": len(one.tokens),
          }
          for one, score in zip(completions, scores, strict=True)
        ],
      }

  def examples(self, count: int) -> list[Mapping[str, Any]]:
    """The first problems with the first completion of each, as JSON."""
    return [
      {"prompt": row["prompt"], "answer": row["answer"], **first}
      for row in itertools.islice(self.rows(), count)
      for first in row["completions"][:1]
    ]


def judge(problems: Problems, completions: tuple[Drawn, ...]) -> Report:
  """Has completions verified, by the first process for all.

  A verifier need not say the same twice, and what is measured decides which
  checkpoint is the best.

  Raises:
    InputError: on all processes: the verifier raised, or gave something else
      than a score.
  """
  verifier = problems.verifier

  def verify() -> tuple[Any, Any]:
    scores, votes = [], []
    for group, answer, name in zip(
      completions, problems.answers, problems.names, strict=True
    ):
      scores.append([verifier.score(one.text, answer, name) for one in group])
      if verifier.vote is not None:
        given = [verifier.vote_of(one.text, name) for one in group]
        votes.append(_numbered(given))
    return scores, None if verifier.vote is None else tuple(votes)

  scores, votes = processes.from_first(verify)
  return Report(
    problems=problems,
    completions=completions,
    scores=np.array(scores),
    votes=votes,
  )


def _numbered(votes: list[Hashable]) -> tuple[int | None, ...]:
  return tuple(None if vote is None else votes.index(vote) for vote in votes)


def _pass_at(config: EvalConfig) -> tuple[int, ...]:
  if config.pass_at is not None:
    return config.pass_at
  return tuple(2**power for power in range(config.samples.bit_length()))


class Evaluator:
  """Asks a model the same problems with whatever weights it is given.

  The same weights give the same report, on every mesh. Compiles at the first
  call. All processes call it, and get the whole report.
  """

  def __init__(self, problems: Problems, model: Model):
    """Compiles nothing yet.

    Args:
      problems: from `prepare`.
      model: in the decode layout.
    """
    self._problems = problems
    self._model = model
    self._generator = Generator(problems.prompts, model)
    places = jax.tree.map(lambda leaf: leaf.sharding, model.abstract_params())
    self._copy = jax.jit(model.working_copy, out_shardings=places)

  def __call__(
    self,
    params: Params,
    watch: Callable[[Iterable[Drawn]], Iterable[Drawn]] = iter,
  ) -> Report:
    """Draws all completions and has them verified.

    Args:
      params: of the model, in any layout of its mesh, float32 or in its
        compute dtype.
      watch: sees the completions of one problem after the other go by; for a
        progress bar.
    """
    if not self._model.is_working_copy(params):
      params = self._copy(params)
    return judge(self._problems, tuple(watch(self._generator(params))))


class Accuracy:
  """The accuracy as a measurement of a run; see `task.Measurement`.

  Attributes:
    every: steps between two.
  """

  def __init__(self, problems: Problems, model: Model):
    """Compiles nothing before the first call; see `Evaluator`."""
    self.every = problems.config.every
    self._evaluator = Evaluator(problems, model)
    self._report: Report | None = None

  def __call__(self, params: Params) -> dict[str, float]:
    """What `Report.metrics` says of the weights."""
    self._report = self._evaluator(params)
    return self._report.metrics()

  def examples(self, count: int) -> list[Mapping[str, Any]]:
    """Of the last report."""
    return [] if self._report is None else self._report.examples(count)
