"""Reward extrapolation: `gopd` past the teacher, with the paper's lam = 1.25.

  A_t = sg((t_t - s_t) + (lam - 1) (t_t - r_t)),  lam = 1.25

Everything else is `gopd`'s. Needs a reference model.

Source: "Learning beyond Teacher", arXiv 2602.12125, Sec. 4 (ExOPD).
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
    lam: weight of log teacher - log reference, > 1.
  """

  lam: float = 1.25

  def __post_init__(self):
    super().__post_init__()
    if not self.lam > 1:
      raise InputError(
        f"lam must be > 1, got {self.lam}; objective gopd takes others"
      )
