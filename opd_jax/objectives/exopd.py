"""Reward extrapolation: `gopd` past the teacher, with the paper's lam = 1.25.

  A_t = sg((t_t - s_t) + (lam - 1) (t_t - r_t)),  lam = 1.25

Everything else is `gopd`'s. Needs a reference model.

Descends: KL(student || target), the target beyond the teacher: log target = lam
log teacher - (lam - 1) log reference, per token.

Off policy: a truncated weight for the sampler, without clips, as in `gopd`.

Use it when: the teacher is a tuned copy of the reference and the student may
end above it: the paper has the student 0.9 to 2.0 points over its teacher at
1.25, and growing answers and an unstable run at 1.5. The margin shrinks as the
teacher gets stronger. Prefer `opd_k1` where no such reference exists: it needs
one model less.

Source: "Learning beyond Teacher", arXiv 2602.12125, Sec. 4 (ExOPD).

Differs: as `gopd` does.
"""

import dataclasses

from opd_jax.errors import InputError
from opd_jax.objectives import gopd
from opd_jax.objectives.gopd import needs as needs
from opd_jax.objectives.gopd import terms as terms


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(gopd.Config):
  """Options.

  Attributes:
    lam: weight of log teacher - log reference, > 1; paper: 1.25, but
      for a sweep to 1.5.
  """

  lam: float = 1.25

  def __post_init__(self):
    super().__post_init__()
    if not self.lam > 1:
      raise InputError(
        f"lam must be > 1, got {self.lam}; objective gopd takes others"
      )
