"""Drawing completions: the decode loop, the filters and the draw itself."""

from opd_jax.sampling.given import Given, choose, complete, ends_in_stop
from opd_jax.sampling.mixed import MixedDecoder
from opd_jax.sampling.sampler import Decoder, check, sample

__all__ = [
  "Decoder",
  "Given",
  "MixedDecoder",
  "check",
  "choose",
  "complete",
  "ends_in_stop",
  "sample",
]
