"""The results as markdown; `docs/generate.py` puts it into docs/results.md."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.study import claims
from benchmarks.study.claims import Claim, Comparison, Finding, accuracies
from benchmarks.study.entries import TABLE
from benchmarks.study.results import Results
from benchmarks.study.runs import SAMPLES
from opd_jax import estimates
from opd_jax.estimates import Interval

Record = Mapping[str, Any]

_COLUMNS = (
  "avg@8",
  "gain, points",
  "entropy",
  "teacher KL",
  "gradient norm",
  "tokens",
  "ms/step",
  "runs",
)


def objectives(found: Results) -> str:
  """The table of all objectives, after the two models as shipped."""
  (student,) = _of("student", found.runs)
  before = accuracies(student, "test")
  lines = [
    f"| | {' | '.join(_COLUMNS)} |",
    "|---" * (len(_COLUMNS) + 1) + "|",
  ]
  for name in ("student", "teacher"):
    share = _share(_of(name, found.runs))
    lines.append(f"| {name}, as shipped | {share}" + " |" * len(_COLUMNS))
  times = (found.timings or {}).get("milliseconds", {})
  for entry in TABLE:
    runs = _of(entry.name, found.runs)
    if runs:
      lines.append(_row(entry.name, runs, before, times.get(entry.name)))
  return "\n".join(lines)


def _row(
  name: str, runs: Sequence[Record], before: np.ndarray, time: float | None
) -> str:
  values = np.array([accuracies(run, "test") for run in runs])
  norms = np.array([run["curves"]["grad_norm"] for run in runs])
  cells = [
    f"`{name}`",
    _share(runs),
    _points(*estimates.crossed(values - before, SAMPLES)),
    _mean(run["probe"]["entropy"] for run in runs),
    _mean(run["probe"]["teacher_kl"] for run in runs),
    f"{np.mean(norms):.2g}, then {np.mean(norms[:, -1]):.2g}",
    f"{np.mean([run['tokens'] for run in runs]):,.0f}",
    "" if time is None else f"{time:.0f}",
    str(len(runs)),
  ]
  return f"| {' | '.join(cells)} |"


def notes(found: Results) -> str:
  """What the entries of the table are, beyond their names."""
  there = {record["entry"] for record in found.runs}
  return "\n".join(
    f"- `{entry.name}`: {entry.note}."
    for entry in TABLE
    if entry.note and entry.name in there
  )


def claimed(found: Results) -> str:
  """Every claim of which something was found."""
  parts = []
  for claim in claims.CLAIMS:
    findings = [
      (comparison, finding)
      for comparison in claim.comparisons
      if (finding := claims.compare(comparison, found.runs)) is not None
    ]
    if findings:
      parts.append(_claim(claim, findings))
  return "\n\n".join(parts)


def _claim(claim: Claim, findings: Sequence[tuple[Comparison, Finding]]) -> str:
  lines = [
    f"### {claim.title}",
    "",
    f"{claim.source}. {claim.design}",
    "",
    "| quantity | first | second | second less first | expected | |",
    "|---|---|---|---|---|---|",
    *(_finding(*one) for one in findings),
  ]
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


def circumstances(found: Results) -> str:
  """When, where and with what the figures were made."""
  text = f"Runs: {_circumstances(found.runs)}."
  if found.timings is not None:
    text += f" Times of a step: {_circumstances([found.timings])}."
  return text


def _circumstances(records: Sequence[Record]) -> str:
  def seen(key: str) -> str:
    return ", ".join(sorted({str(record[key]) for record in records}))

  return (
    f"{seen('date')}, commit {seen('commit')}, jax {seen('jax')}, Python "
    f"{seen('python')}, {seen('device')} with {seen('cores')} cores"
  )


def _of(name: str, records: Sequence[Record]) -> list[Record]:
  return [record for record in records if record["entry"] == name]


def _share(runs: Sequence[Record]) -> str:
  """The accuracy of one model, or over several runs."""
  values = np.array([accuracies(run, "test") for run in runs])
  if len(runs) == 1:
    mean, ends = float(np.mean(values)), estimates.interval(values[0], SAMPLES)
  else:
    mean, ends = estimates.crossed(values, SAMPLES)
  low, high = np.clip(ends, 0, 1)
  return f"{100 * mean:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def _points(mean: float, interval: Interval) -> str:
  low, high = (100 * end for end in interval)
  return f"{100 * mean:+.1f} ({low:+.1f} to {high:+.1f})"


def _mean(values: Iterable[float]) -> str:
  return f"{np.mean([*values]):.4f}"
