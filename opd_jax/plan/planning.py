"""From a config and a topology to a report."""

import contextlib
from collections.abc import Iterator

import rich.console

from opd_jax.config import RunConfig
from opd_jax.models import published
from opd_jax.plan import fit, remedies, speed, topology
from opd_jax.plan.compiling import Compiled
from opd_jax.plan.fit import Counted, Load
from opd_jax.plan.report import Report
from opd_jax.plan.topology import Topology


def plan(
  location: str,
  load: Load,
  where: Topology,
  *,
  analytic: bool = False,
  with_remedies: bool = True,
) -> Report:
  """Plans a run.

  Args:
    location: of its config, for the report.
    load: its config with more overrides.
    where: it would run.
    analytic: count only; GPUs always are.
    with_remedies: where it does not fit, find changes with which it does.

  Raises:
    InputError: a config or topology that cannot be.
  """

  def count(config: RunConfig) -> Counted:
    return fit.count(config, where, published.architecture)

  counted = count(load(()))
  found: list[remedies.Remedy] | None = None
  if analytic or not where.is_tpu:
    if with_remedies and counted.estimate.total > counted.memory:
      _tell_of_search()
      found = remedies.count_only(load, counted, count)
    return Report(
      location=location,
      counted=counted,
      compiled=None,
      speed=speed.of(counted, ()),
      remedies=found,
    )
  with topology.quiet():
    compiled = _compile(counted, "the step")
    if with_remedies and not compiled.fits(counted.memory):
      overflow = compiled.overflow
      needed = overflow.used if overflow is not None else compiled.total
      _tell_of_search()
      found = remedies.find(
        load,
        counted,
        needed or counted.estimate.total,
        count,
        lambda changed, change: _compile(changed, change.flags),
      )
  return Report(
    location=location,
    counted=counted,
    compiled=compiled,
    speed=speed.of(
      counted, [one.text for one in compiled.accounts if one.text is not None]
    ),
    remedies=found,
  )


def _compile(counted: Counted, what: str) -> Compiled:
  """Compiles, and says so: it takes minutes."""
  with _telling(f"compiling {what} for {counted.topology.name}"):
    return fit.compile_for(counted.blueprint, counted.topology)


def _tell_of_search() -> None:
  _console().print("looking for changes with which it fits")


@contextlib.contextmanager
def _telling(what: str) -> Iterator[None]:
  """A moving line on a terminal, else a plain one."""
  console = _console()
  if console.is_terminal:
    with console.status(what):
      yield
    return
  console.print(what, soft_wrap=True)
  yield


def _console() -> rich.console.Console:
  return rich.console.Console(stderr=True, markup=False, highlight=False)
