"""Drawing completions: the decode loop, the filters and the draw itself."""

from opd_jax.sampling.mixed import MixedDecoder
from opd_jax.sampling.sampler import Decoder, check, sample

__all__ = ["Decoder", "MixedDecoder", "check", "sample"]
