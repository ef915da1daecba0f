"""`opd-jax eval`: how often a model is right."""

import dataclasses
import itertools
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from opd_jax.cli import drawing
from opd_jax.cli.flags import check_file, new, parse, write
from opd_jax.errors import InputError

_EXAMPLES = 3


def run(arguments: Sequence[str]) -> int:
  """Runs the command; returns the exit status."""
  values = _flags()
  if not parse(values, "eval", arguments, required=("model",)):
    return 0
  if values.json:
    check_file("--json", values.json)
  from opd_jax import evaluate, saved
  from opd_jax.evaluate import Evaluator

  found = saved.find(values.model, values.step)
  config, sampling = _config(values, found.config)
  problems = evaluate.prepare(
    config, sampling, found.tokenizer(), found.architecture
  )
  count = len(problems.answers)
  model = found.decoder(
    drawing.dtype(values, found.config), values.tensor, min(count, config.batch)
  )
  evaluator = Evaluator(problems, model)
  report = evaluator(
    found.load(model), lambda drawn: drawing.watch(drawn, count, "problems")
  )
  for line in _describe(values.model, found.step, report):
    print(line)
  if values.json:
    write(values.json, _figures(values.model, found.step, report))
  return 0


def _flags() -> Any:
  from absl import flags

  values = new()
  options: dict[str, Any] = {"flag_values": values}
  drawing.define(values, samples="the config's, or 4")
  flags.DEFINE_string(
    "config",
    None,
    "FILE.py[:ARG]: take its `eval` and `sampling` groups, not the run's",
    **options,
  )
  flags.DEFINE_string(
    "prompt", None, "template, with --data: {question}", **options
  )
  flags.DEFINE_string(
    "answer", None, "template, with --data: {answer}", **options
  )
  flags.DEFINE_string(
    "verifier", None, "exact, number or module:function", **options
  )
  flags.DEFINE_list("pass_at", None, "the k of pass@k, as 1,4,16", **options)
  flags.DEFINE_string("json", None, "file to write all figures to", **options)
  return values


def _config(values: Any, run_config: Any) -> tuple[Any, Any]:
  """What to evaluate, and how to draw where it does not say.

  From --config, or the run's config, or nothing; then what the flags say.
  """
  from opd_jax import parsing
  from opd_jax.config import EvalConfig, SamplingConfig

  config, sampling = EvalConfig(), SamplingConfig()
  if values.config:
    groups = parsing.read(values.config)
    config = parsing.parse(EvalConfig, groups.get("eval", {}), "eval.")
    sampling = parsing.parse(
      SamplingConfig, groups.get("sampling", {}), "sampling."
    )
  elif run_config is not None:
    config = run_config.eval
    sampling = drawing.run_sampling(run_config)
  changes: dict[str, Any] = drawing.given(
    values, ("samples", "verifier", "seed", "batch")
  )
  if values.pass_at is not None:
    changes["pass_at"] = _numbers("--pass_at", values.pass_at)
  elif "samples" in changes:
    changes["pass_at"] = None
  changes["source"] = drawing.source(values, config.source, values.prompt)
  if changes["source"] is None:
    raise InputError(
      "nothing to evaluate on; name problems by --data, or a --config or run "
      "whose eval.source does"
    )
  changes["sampling"] = drawing.sampling(values, config.sampling or sampling)
  return drawing.replaced("eval", config, changes), sampling


def _numbers(flag: str, texts: Sequence[str]) -> tuple[int, ...]:
  if not all(text.isdecimal() for text in texts):
    raise InputError(
      f"{flag} must be whole numbers with commas between them, got "
      f"{','.join(texts)!r}"
    )
  return tuple(map(int, texts))


def _describe(name: str, step: int | None, report: Any) -> Iterator[str]:
  """The lines to print."""
  problems = report.problems
  config, prompts = problems.config, problems.prompts
  at = "" if step is None else f" after step {step}"
  yield (
    f"{name}{at}: {len(problems.answers)} problems of {config.source.path} x "
    f"{config.samples} samples, verifier {config.verifier}"
  )
  sampling = prompts.sampling
  filters = "".join(
    f", {name} {value:g}"
    for name in ("top_k", "top_p", "min_p")
    if (value := getattr(sampling, name)) is not None
  )
  yield (
    f"temperature {sampling.temperature:g}{filters}, at most "
    f"{sampling.max_new_tokens} new tokens, stop ids {list(prompts.stop_ids)}, "
    f"seed {config.seed}"
  )
  yield ""
  yield f"{'':10} {'value':>8}   95 % interval"
  for measure, estimate in report.figures.items():
    low, high = (100 * end for end in estimate.interval)
    yield (
      f"{measure:10} {100 * estimate.value:6.1f} %   {low:.1f} - {high:.1f} %"
    )
  metrics = report.metrics()
  yield f"{'truncated':10} {100 * metrics['eval/truncated']:6.1f} %"
  yield f"{'length':10} {metrics['eval/length_mean']:6.1f} tokens"
  rows = itertools.islice(report.rows(), _EXAMPLES)
  for row, where in zip(rows, problems.names, strict=False):
    first = row["completions"][0]
    yield ""
    yield f"{where}: score {first['score']:g}, answer {row['answer']!r}"
    yield textwrap.indent(row["prompt"] + first["text"], "  ", lambda _: True)


def _figures(name: str, step: int | None, report: Any) -> Mapping[str, Any]:
  """What is printed, unrounded, and every completion."""
  problems = report.problems
  return {
    "model": name,
    "step": step,
    "config": dataclasses.asdict(problems.config),
    "problems": len(problems.answers),
    "estimates": {
      measure: {"value": estimate.value, **estimate.interval._asdict()}
      for measure, estimate in report.figures.items()
    },
    "metrics": report.metrics(),
    "rows": list(report.rows()),
  }
