"""One run of the study in a process of its own, and the file of all results.

    python -m benchmarks.study.runs --entry=NAME --seed=N --work=DIR

trains, evaluates what came out, measures it once more on fresh prompts, and
writes DIR/NAME-N-DIGEST/record.json.
"""

import argparse
import copy
import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.study.entries import ENTRIES, REPO, Entry
from opd_jax import (
  arith,
  evaluate,
  parsing,
  preflight,
  saved,
  setup,
  sft,
  train,
)
from opd_jax.config import EvalConfig, RunConfig, SamplingConfig, SftConfig

QUICKSTART = "configs/quickstart.py"
# The evaluation: problems, and samples of each.
PROBLEMS, SAMPLES = 250, 8
# Prompts and seed of the measurement on the final weights.
PROBE_PROMPTS, PROBE_SEED = 512, 1000
# Completions that are generated, and their file in the folder of the run.
GENERATED, STORE = 6400, "completions.parquet"
# Held-out solutions, for what follows the held-out loss.
TEXTS = "texts.jsonl"
CURVES = {
  "grad_norm": "optimizer/grad_norm",
  "entropy": "student/entropy",
  "teacher_kl": "teacher/kl",
}


def config_values(entry: Entry, seed: int) -> dict[str, Any]:
  """The config of a run as nested dicts; "@NAME" stands as it is."""
  values = parsing.read(entry.config)
  # Evaluated after the run instead, problem by problem.
  values |= {name: {} for name in ("eval", "held_out") if name in values}
  values["seed"] = seed
  values["log"] = {"every": 5, "sample_every": 100}
  if entry.command == "train":
    values["log"]["time_split_every"] = None
  for name, value in entry.values.items():
    *groups, key = name.split(".")
    inside = values
    for group in groups:
      inside = inside.setdefault(group, {})
    inside[key] = copy.deepcopy(value)
  return values


def digest(entry: Entry, seed: int) -> str:
  """Of all that a run computes, what it reads from other runs included."""
  parts = {
    "command": entry.command,
    "values": config_values(entry, seed),
    "levels": dict(entry.levels),
    "evaluation": [PROBLEMS, SAMPLES, PROBE_PROMPTS, PROBE_SEED, GENERATED],
    "needs": {
      name: digest(ENTRIES[name], ENTRIES[name].seeds[0])
      for name in sorted(entry.needs())
    },
  }
  if entry.command == "generate":
    parts["file"] = STORE
  text = json.dumps(parts, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def folder(work: Path, entry: Entry, seed: int) -> Path:
  """Of a run; another config has another one."""
  return work / f"{entry.name}-{seed}-{digest(entry, seed)}"


def output(work: Path, name: str) -> str:
  """What "@NAME" stands for: a checkpoint, or a file of completions."""
  entry = ENTRIES[name]
  place = folder(work, entry, entry.seeds[0])
  leaf = {"generate": STORE, "texts": TEXTS}.get(entry.command, "export")
  return str(place / leaf)


def resolved(values: Any, work: Path) -> Any:
  """`values` with outputs in place of "@NAME"."""
  if isinstance(values, Mapping):
    return {key: resolved(part, work) for key, part in values.items()}
  if isinstance(values, str) and values[:1] == "@":
    return output(work, values[1:])
  return values


def run(entry: Entry, seed: int, work: Path) -> dict[str, Any]:
  """Makes a run, and says what became of it."""
  place = folder(work, entry, seed)
  values = resolved(config_values(entry, seed), work)
  record: dict[str, Any] = {
    "entry": entry.name,
    "seed": seed,
    "digest": digest(entry, seed),
    **circumstances(),
  }
  if entry.command == "generate":
    generate(values["student"]["path"], seed, place / STORE)
    return record
  if entry.command == "texts":
    texts(place / TEXTS)
    return record
  checkpoint = values["student"]["path"]
  if entry.command != "eval":
    record |= trained(entry, values, place)
    checkpoint = str(place / "export")
    if entry.levels:
      teacher = values.get("teacher", {}).get("path")
      record["probe"] = probe(checkpoint, teacher)
  record["right"] = {
    name: right(checkpoint, levels) for name, levels in entry.levels.items()
  }
  return record


def texts(path: Path) -> None:
  """Writes solved problems of the held-out split, one a line."""
  rows = arith.rows({"rows": PROBLEMS}, "test")
  lines = [
    json.dumps({"text": row["question"] + row["solution"]}) for row in rows
  ]
  path.write_text("\n".join(lines) + "\n")


def circumstances() -> dict[str, Any]:
  """When, where and with what."""
  commit = subprocess.run(
    ["git", "rev-parse", "--short=12", "HEAD"],
    capture_output=True,
    text=True,
    cwd=REPO,
    check=True,
  )
  return {
    "date": datetime.date.today().isoformat(),
    "commit": commit.stdout.strip(),
    "jax": jax.__version__,
    "python": platform.python_version(),
    "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
    "cores": os.cpu_count(),
  }


def trained(
  entry: Entry, values: Mapping[str, Any], place: Path
) -> dict[str, Any]:
  """Trains, and collects the log."""
  if entry.command == "sft":
    summary = sft.sft(parsing.parse(SftConfig, values), place)
  else:
    summary = train.train(parsing.parse(RunConfig, values), place)
  lines = (place / "metrics.jsonl").read_text().splitlines()
  return {
    **collect([json.loads(line) for line in lines]),
    "seconds": round(summary.seconds, 1),
    "compile_seconds": round(summary.compile_seconds, 1),
  }


def collect(records: list[dict[str, float]]) -> dict[str, Any]:
  """Curves and totals of the records of metrics.jsonl.

  A record is the mean over the steps since the one before. A metric that some
  record has not is left out. Tokens are those drawn, or learned from where none
  are.
  """
  records = [record for record in records if "time/step" in record]
  steps = np.diff([0, *(record["step"] for record in records)])
  drawn = "rollout/tokens" in records[0]

  def total(metric: str) -> float:
    values = [record[metric] for record in records]
    return float(np.dot(steps, values))

  curves = {
    short: [float(f"{record[metric]:.5g}") for record in records]
    for short, metric in CURVES.items()
    if all(metric in record for record in records)
  }
  return {
    "steps": int(records[-1]["step"]),
    "tokens": round(total("rollout/tokens" if drawn else "packing/learned")),
    "step_seconds": round(total("time/step"), 2),
    "curve_steps": [int(record["step"]) for record in records],
    "curves": curves,
  }


def probe(checkpoint: str, teacher: str | None) -> dict[str, float]:
  """Entropy and teacher KL of a student on completions of its own.

  One step of gkd with beta 1 before its update: the loss is
  KL(student || teacher) over the whole vocabulary, in nats per token. Prompts
  and draws are the same for all students.

  Args:
    checkpoint: of the student.
    teacher: its checkpoint; None for the quickstart's.
  """
  values = parsing.read(QUICKSTART)
  values["student"]["path"] = checkpoint
  if teacher is not None:
    values["teacher"]["path"] = teacher
  values |= {"eval": {}, "seed": PROBE_SEED, "steps": 1}
  values["batch"]["prompts"] = PROBE_PROMPTS
  task, batches = distillation(parsing.parse(RunConfig, values))
  state = task.initial_state()
  task.compile(state)
  _, metrics, _ = task.step(state, next(batches))
  return {
    "entropy": float(metrics["student/entropy"]),
    "teacher_kl": float(metrics["train/loss"]),
    "length": float(metrics["rollout/length_mean"]),
  }


def distillation(config: RunConfig) -> tuple[train.Distillation, Any]:
  """A task of `train` and its batches."""
  prepared = setup.prepare(config)
  step = setup.make_step(prepared)
  report = preflight.inspect(prepared, step)
  return train.Distillation(prepared, step, report), prepared.prompts


def right(checkpoint: str, levels: Any) -> list[int]:
  """How many of the samples of each problem are right."""
  found = saved.find(checkpoint)
  config = parsing.parse(
    EvalConfig,
    {
      "source": {
        "path": "arith",
        "split": "test",
        "options": {"rows": PROBLEMS, "levels": levels},
        "prompt": {"text": "{question}"},
      },
      "samples": SAMPLES,
      "batch": PROBLEMS,
    },
    "eval.",
  )
  problems = evaluate.prepare(
    config,
    SamplingConfig(max_new_tokens=48),
    found.tokenizer(),
    found.architecture,
  )
  model = found.decoder("float32", 1, PROBLEMS)
  report = evaluate.Evaluator(problems, model)(found.load(model))
  return report.right.sum(axis=1).tolist()


def generate(model: str, seed: int, out: Path) -> None:
  """Has a model complete problems of the training split."""
  out.parent.mkdir(parents=True, exist_ok=True)
  command = (
    f"generate --model={model} --data=arith --rows={GENERATED} --seed={seed} "
    f"--max_new_tokens=48 --out={out}"
  )
  subprocess.run(
    [
      *(sys.executable, "-m", "opd_jax.cli"),
      *command.split(),
      "--prompt={question}",
    ],
    check=True,
    cwd=REPO,
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--entry", required=True, choices=ENTRIES)
  parser.add_argument("--seed", required=True, type=int)
  parser.add_argument("--work", required=True, type=Path)
  options = parser.parse_args()
  work = options.work.absolute()
  os.chdir(REPO)
  entry = ENTRIES[options.entry]
  record = run(entry, options.seed, work)
  place = folder(work, entry, options.seed)
  place.mkdir(parents=True, exist_ok=True)
  (place / "record.json").write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
  main()
