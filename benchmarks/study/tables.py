"""The results as markdown; `docs/generate.py` puts it into docs/results.md."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.study import claims
from benchmarks.study.claims import Claim, Comparison, Finding, accuracies
from benchmarks.study.entries import TABLE
from benchmarks.study.runs import SAMPLES
from opd_jax import estimates
from opd_jax.estimates import Interval

Record = Mapping[str, Any]
NONE = "–"


def objectives(records: Sequence[Record]) -> str:
  """The table of all objectives."""
  (student,) = _of("student", records)
  before = accuracies(student, "test")
  lines = [
    "| | avg@8 | gain | entropy | teacher KL | gradient norm | tokens | "
    "seconds | runs |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  for name in ("student", "teacher"):
    (record,) = _of(name, records)
    values = accuracies(record, "test")
    low, high = estimates.interval(values, SAMPLES)
    share = _share(float(np.mean(values)), Interval(low, high))
    lines.append(f"| {name}, as shipped | {share}" + " | " * 7 + " |")
  for entry in TABLE:
    runs = _of(entry.name, records)
    if runs:
      lines.append(_row(entry.name, runs, before))
  return "\n".join(lines)


def _row(name: str, runs: Sequence[Record], before: np.ndarray) -> str:
  values = np.array([accuracies(run, "test") for run in runs])
  cells = [
    f"`{name}`",
    _share(*estimates.crossed(values, SAMPLES)),
    _points(*estimates.crossed(values - before, SAMPLES)),
    _mean(run["probe"]["entropy"] for run in runs),
    _mean(run["probe"]["teacher_kl"] for run in runs),
    _curve("grad_norm", runs),
    f"{np.mean([run['tokens'] for run in runs]):,.0f}",
    f"{np.mean([run['step_seconds'] for run in runs]):.0f}",
    str(len(runs)),
  ]
  return f"| {' | '.join(cells)} |"


def notes() -> str:
  """What the entries of the table are, beyond their names."""
  return "\n".join(
    f"- `{entry.name}`: {entry.note}." for entry in TABLE if entry.note
  )


def claimed(records: Sequence[Record]) -> str:
  """Every claim with what was found."""
  return "\n\n".join(_claim(claim, records) for claim in claims.CLAIMS)


def _claim(claim: Claim, records: Sequence[Record]) -> str:
  lines = [
    f"### {claim.title}",
    "",
    f"{claim.source}. {claim.design}",
    "",
    "| quantity | first | second | second - first | expected | |",
    "|---|---|---|---|---|---|",
  ]
  for comparison in claim.comparisons:
    finding = claims.compare(comparison, records)
    if finding is not None:
      lines.append(_finding(comparison, finding))
  return "\n".join(lines)


def _finding(comparison: Comparison, finding: Finding) -> str:
  quantity = comparison.quantity
  if quantity is None:
    name = f"avg@{SAMPLES}, {comparison.problems}"
    difference = _points(finding.difference, finding.interval)
    ends = [f"{100 * x:.1f} %" for x in (finding.first, finding.second)]
  else:
    name = f"{quantity.replace('_', ' ')}, mean"
    low, high = finding.interval
    difference = f"{finding.difference:+.3g} ({low:+.3g} to {high:+.3g})"
    ends = [f"{x:.3g}" for x in (finding.first, finding.second)]
  cells = [
    name,
    f"`{comparison.first}` {ends[0]}",
    f"`{comparison.second}` {ends[1]}",
    difference,
    comparison.expected,
    f"{finding.verdict}, {len(finding.seeds)} seeds",
  ]
  return f"| {' | '.join(cells)} |"


def circumstances(records: Sequence[Record]) -> str:
  """When, where and with what the runs were made."""

  def seen(key: str) -> str:
    return ", ".join(sorted({str(record[key]) for record in records}))

  return (
    f"Made {seen('date')} at commit {seen('commit')}, with jax {seen('jax')}, "
    f"Python {seen('python')}, on {seen('device')} with {seen('cores')} cores."
  )


def _of(name: str, records: Sequence[Record]) -> list[Record]:
  return [record for record in records if record["entry"] == name]


def _share(mean: float, interval: Interval) -> str:
  low, high = (100 * end for end in interval)
  return f"{100 * mean:.1f} % ({low:.1f} to {min(high, 100.0):.1f})"


def _points(mean: float, interval: Interval) -> str:
  low, high = (100 * end for end in interval)
  return f"{100 * mean:+.1f} ({low:+.1f} to {high:+.1f})"


def _mean(values: Iterator[float]) -> str:
  return f"{np.mean([*values]):.4f}"


def _curve(name: str, runs: Sequence[Record]) -> str:
  """Mean over the run, and the mean of its last record."""
  curves = np.array([run["curves"][name] for run in runs])
  return f"{np.mean(curves):.2f}, {np.mean(curves[:, -1]):.2f}"
