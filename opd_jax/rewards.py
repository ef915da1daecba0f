"""The host stage of a step: what a verifier says of the completions.

It runs between rollout and update, in `mode="split"`: the completions come to
the host as ids, become text, and are compared with the answers of their rows.
Every process has all completions; the first verifies them and tells the others,
since a verifier need not say the same twice, and what the devices hold must be
the same everywhere.

A host stage is a function of the batch and its rollout that gives the rollout
back with more in it; what it adds is declared in `objectives.base.Needs`.
"""

import dataclasses

import jax
import numpy as np
from jaxtyping import Float

from opd_jax import processes, verifiers
from opd_jax.config import RewardConfig
from opd_jax.data.prompts import Batch, Prompts
from opd_jax.tokenizer import Tokenizer
from opd_jax.types import Rollout
from opd_jax.verifiers import Verifier


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewards:
  """Verifies completions; made by `prepare`.

  Attributes:
    verifier: says what is right.
    tokenizer: of the student.
    prompts: of the run, which know where a row is from.
  """

  verifier: Verifier
  tokenizer: Tokenizer
  prompts: Prompts

  def __call__(self, batch: Batch, rollout: Rollout) -> Float[np.ndarray, " B"]:
    """The score of every completion, in [0, 1]; all processes call it.

    Args:
      batch: the prompts, P of them, with their answers.
      rollout: completions of them, B = P x G.

    Raises:
      InputError: on all processes: the verifier raised, or gave something else
        than a score.
    """
    rollout = jax.device_get(rollout)
    return processes.from_first(lambda: self._verify(batch, rollout))

  def _verify(self, batch: Batch, rollout: Rollout) -> Float[np.ndarray, " B"]:
    rows = len(rollout.tokens)
    rollouts = rows // len(batch.rows)
    scores = [
      self.verifier.score(
        completion(self.tokenizer, rollout, row),
        batch.answers[row // rollouts],
        self.prompts.where(batch.rows[row // rollouts]),
      )
      for row in range(rows)
    ]
    return np.array(scores, np.float32)


def prepare(
  config: RewardConfig, tokenizer: Tokenizer, prompts: Prompts
) -> Rewards:
  """The rewards of a run, tried on two completions of every row.

  These are nothing, and the answer itself: what fails here would otherwise
  fail in the middle of the run. The first process tries it for all.

  Args:
    config: names the verifier.
    tokenizer: of the student.
    prompts: of the run, with answers.

  Raises:
    InputError: bad verifier, or an answer that it cannot bear.
  """
  verifier = verifiers.load(config.verifier)

  def attempt() -> None:
    for row, answer in prompts.answers():
      for text in ("", answer):
        verifier.score(text, answer, prompts.where(row))

  processes.from_first(attempt)
  return Rewards(verifier=verifier, tokenizer=tokenizer, prompts=prompts)


def completion(tokenizer: Tokenizer, rollout: Rollout, row: int) -> str:
  """The text of a completion of a rollout on the host."""
  prompt = rollout.prompts.tokens[row][: rollout.prompts.lengths[row]]
  ids = rollout.tokens[row][: rollout.lengths[row]]
  return tokenizer.decode_after(prompt.tolist(), ids.tolist())
