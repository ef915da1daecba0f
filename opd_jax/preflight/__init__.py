"""What may be wrong with a run, found before anything is placed on a device.

`inspect` looks at what `setup.prepare` has read: tokenizers, special ids,
templates, data, memory. It runs on the host; `probe` alone loads the student.
"""

from opd_jax.config import SftConfig
from opd_jax.data import sources
from opd_jax.preflight import data, device, probe, templates, vocabulary
from opd_jax.preflight.report import KINDS, Finding, Report, Section
from opd_jax.setup import Setup
from opd_jax.step import Step

__all__ = ["KINDS", "Finding", "Report", "Section", "inspect", "inspect_rows"]


@sources.read_once()
def inspect(setup: Setup, step: Step, *, with_probe: bool = False) -> Report:
  """Looks at all parts of a run.

  Args:
    setup: what the run is made of.
    step: of the run; its shapes and places are read.
    with_probe: also load the student and sample a few completions.

  Raises:
    InputError: `preflight.allow` names no finding, or a template that does not
      fit its row.
  """
  sections = [
    vocabulary.inspect(setup),
    templates.inspect(setup),
    data.inspect(setup),
    device.inspect(setup, step),
  ]
  if with_probe:
    sections.append(probe.inspect(setup, step))
  return Report(sections=tuple(sections), allow=setup.config.preflight.allow)


def inspect_rows(config: SftConfig) -> Report:
  """Looks at the rows of a fine-tuning alone.

  Raises:
    InputError: `preflight.allow` names no finding, or a template that does not
      fit its row.
  """
  return Report(
    sections=(data.inspect_rows(config),), allow=config.preflight.allow
  )
