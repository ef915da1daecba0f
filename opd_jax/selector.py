"""Which tokens carry loss: token importance (TIP), for any objective.

With h = H(student) / log V the entropy of the student's next-token distribution
over its largest value, d = KL(student || teacher), f = KL(teacher || student),
and x' the value x of a token normalised to [0, 1],

  h' = (min(h, q) - min) / (max - min)      q the `cap` quantile of h
  d' = (d - min) / (max - min)              0 where max = min

the tokens are ranked by

  soft_or           1 - (1 - h') (1 - d')   Eq. 7
  q3                f (1 - h')              Sec. 7.3
  entropy           h
  divergence        d
  entropy_sampling  log h + Gumbel noise: drawn without replacement, p ~ h

and of a rollout of m tokens the first max(1, floor(rho m)) carry loss (Eq. 8);
ties go to the earlier token. Quantile, minimum and maximum run over all tokens
of the global batch, or of the rollout. No gradient flows through any of it.

To everything behind it the chosen tokens are the tokens that carry loss: an
objective's `prepare`, its means and the counts see no others, and draws are not
weighted by their probability. Eq. 9, a mean over rollouts of means over their
chosen tokens, is the reduction "seq_mean_token_mean". What an objective carries
across tokens, such as a discounted sum, takes the others as 0 where `prepare`
does it, and does not see them at all where it needs whole rows.

The student that is ranked is the one after the plain prompt.

What it descends: with an objective over whole distributions, its sum over the
chosen tokens, the choice fixed. With a policy gradient on drawn tokens there is
a bias: whether a token is chosen depends on tokens drawn after it, through the
length and the ranks of its rollout, and no score corrects for that.

Source: "TIP: Token Importance in On-Policy Distillation", arXiv 2604.14084v4.

Differs: the scope of quantile, minimum and maximum, what becomes of ties and of
less than one token, the paper does not say. floor(rho m) is a product of
integers. In the published repository neither Soft-OR nor the cap is found: this
follows the paper.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from opd_jax.config import SelectionConfig
from opd_jax.objectives import divergences, selection
from opd_jax.objectives.base import Needs, Objective, Request

# [B, T] arrays of what tokens are ranked by: "entropy" over its largest value,
# "reverse_kl" and "forward_kl" in nats.
Measures = Mapping[str, Float[Array, "B T"]]

_DIVERGENCE = {
  "soft_or": "reverse_kl",
  "divergence": "reverse_kl",
  "q3": "forward_kl",
}


def reads_teacher(config: SelectionConfig) -> bool:
  """Whether the tokens are ranked by what the teacher says."""
  return config.name in _DIVERGENCE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selector:
  """Chooses the tokens of a step that carry loss; hashable and stateless.

  Attributes:
    config: how.
    vocab_size: V, ids shared by all models.
  """

  config: SelectionConfig
  vocab_size: int

  @property
  def roles(self) -> tuple[str, ...]:
    """The models whose whole distributions are looked at, at every token."""
    if reads_teacher(self.config):
      return ("student", "teacher")
    return ("student",)

  def needs(self, objective: Objective) -> Needs:
    """What the pass that ranks the tokens finds of them, for others to read.

    What `prepare` reads and, of the frozen models that are run in it anyway,
    what `terms` does.
    """

    def request(role: str) -> Request:
      before = getattr(objective.prepare_needs, role)
      after = getattr(objective.needs, role)
      if role in objective.needs.gradient_roles() or role not in self.roles:
        return before
      return Request(
        logprobs=before.logprobs or after.logprobs,
        entropy=before.entropy or after.entropy,
      )

    return Needs(
      student=request("student"),
      student_privileged=request("student_privileged"),
      teacher=request("teacher"),
      reference=request("reference"),
    )

  def capacity(self, length: int) -> int:
    """The most tokens of a row of `length` slots that may be chosen."""
    if self.config.select_scope == "batch":
      return length
    share = selection.rational(self.config.fraction)
    return max(1, math.floor(share * length))

  def measure(
    self, logprobs: Mapping[str, Float[Array, "B C V"]]
  ) -> dict[str, Float[Array, "B C"]]:
    """What is compared, of some tokens: pointwise, from whole distributions."""
    student = logprobs["student"]
    largest = math.log(max(self.vocab_size, 2))
    found = {"entropy": divergences.entropy(student) / largest}
    name = _DIVERGENCE.get(self.config.name)
    if name is not None:
      function = divergences.DIVERGENCES[name]
      found[name] = function(student, logprobs["teacher"])
    return found

  def scores(
    self, measures: Measures, mask: Bool[Array, "B T"], key: Key[Array, ""]
  ) -> Float[Array, "B T"]:
    """What the tokens are ranked by; 0 where `mask` is false.

    Args:
      measures: of all tokens of the global batch.
      mask: the tokens to choose from.
      key: of the draws.
    """
    name, entropy = self.config.name, measures["entropy"]
    if name == "entropy":
      found = entropy
    elif name == "divergence":
      found = measures["reverse_kl"]
    elif name == "entropy_sampling":
      noise = jax.random.gumbel(key, entropy.shape, entropy.dtype)
      found = jnp.log(jnp.maximum(entropy, 0.0)) + noise
    else:
      per_row = self.config.norm_scope == "rollout"
      bound = selection.quantile(entropy, mask, self.config.cap, per_row)
      spread = normalized(jnp.minimum(entropy, bound), mask, per_row)
      if name == "q3":
        found = measures["forward_kl"] * (1.0 - spread)
      else:
        gap = normalized(measures["reverse_kl"], mask, per_row)
        # Exactly 1 where either is, so that rounding does not break ties.
        found = 1.0 - (1.0 - spread) * (1.0 - gap)
    return jnp.where(mask, found, 0.0)

  def choose(
    self, scores: Float[Array, "B T"], mask: Bool[Array, "B T"]
  ) -> Bool[Array, "B T"]:
    """The tokens of the highest scores, rho of those in `mask`."""
    per_row = self.config.select_scope == "rollout"
    return selection.largest(scores, mask, self.config.fraction, per_row)


def normalized(
  values: Float[Array, "B T"], mask: Bool[Array, "B T"], per_row: bool
) -> Float[Array, "B T"]:
  """(x - min) / (max - min) over each row or all; 0 where max = min."""
  axis = 1 if per_row else None
  low, high = (
    extreme(jnp.where(mask, values, empty), axis=axis, keepdims=True)
    for extreme, empty in ((jnp.min, jnp.inf), (jnp.max, -jnp.inf))
  )
  varied = high > low
  found = (values - low) / jnp.where(varied, high - low, 1.0)
  # A compiler may multiply by the reciprocal, which would leave less than 1.
  found = jnp.where(values < high, found, 1.0)
  return jnp.where(varied & mask, found, 0.0)


@dataclasses.dataclass(frozen=True)
class Kept:
  """Rows of the chosen tokens alone, in their order: [B, T] to [B, K].

  With K = T nothing moves.

  Attributes:
    mask: the chosen tokens, at most K of each row.
    size: K.
  """

  mask: Bool[Array, "B T"]
  size: int

  def gather(self, tree: Any) -> Any:
    """[B, T, ...] -> [B, K, ...], 0 behind the chosen tokens of a row."""
    if self.size == self.mask.shape[1]:
      return self._where(self.mask, tree)
    slots = jnp.argsort(~self.mask, axis=1, stable=True)[:, : self.size]
    return self._where(self._filled(), self._take(slots, tree))

  def scatter(self, tree: Any) -> Any:
    """[B, K, ...] -> [B, T, ...], 0 at the other tokens."""
    if self.size == self.mask.shape[1]:
      return self._where(self.mask, tree)
    slots = jnp.cumsum(self.mask, axis=1, dtype=jnp.int32) - 1
    slots = jnp.clip(slots, 0, self.size - 1)
    return self._where(self.mask, self._take(slots, tree))

  def _filled(self) -> Bool[Array, "B K"]:
    count = jnp.sum(self.mask, axis=1, dtype=jnp.int32, keepdims=True)
    return jnp.arange(self.size, dtype=jnp.int32) < count

  def _take(self, slots: Any, tree: Any) -> Any:
    def leaf(array: Array) -> Array:
      index = slots.reshape(slots.shape + (1,) * (array.ndim - 2))
      return jnp.take_along_axis(array, index, axis=1)

    return jax.tree.map(leaf, tree)

  def _where(self, mask: Any, tree: Any) -> Any:
    def leaf(array: Array) -> Array:
      kept = mask.reshape(mask.shape + (1,) * (array.ndim - 2))
      return jnp.where(kept, array, jnp.zeros((), array.dtype))

    return jax.tree.map(leaf, tree)
