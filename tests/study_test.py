"""The study of the objectives: what it collects, compares and shows."""

import dataclasses
import json

import numpy as np
import pytest

from benchmarks import objectives as command
from benchmarks.study import claims, results, runs, tables
from benchmarks.study.claims import Comparison
from benchmarks.study.entries import ENTRIES, MAKER_SEED, REPO, TABLE, Entry
from benchmarks.study.results import Results
from opd_jax import objectives, parsing
from opd_jax.config import RunConfig, SftConfig


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
  """Configs name their checkpoints from there."""
  monkeypatch.chdir(REPO)


def record(name, seed, right, **fields):
  """A record as `runs.run` makes it, of four problems."""
  return {
    "entry": name,
    "seed": seed,
    "digest": runs.digest(ENTRIES[name], seed),
    "date": "2026-01-02",
    "commit": "abc",
    "jax": "1",
    "python": "3",
    "device": "1 x cpu",
    "cores": 2,
    "tokens": 1000,
    "right": {"test": right},
    "probe": {"entropy": 0.5, "teacher_kl": 0.25},
    "curves": {"grad_norm": [3.0, 1.0], "entropy": [0.2, 0.1]},
    **fields,
  }


@pytest.mark.parametrize("name", ENTRIES)
def test_every_entry_is_a_config(name, tmp_path):
  entry = ENTRIES[name]
  values = runs.resolved(runs.config_values(entry, 7), tmp_path)
  assert "@" not in json.dumps(values)
  config = parsing.parse(
    SftConfig if entry.command == "sft" else RunConfig, values
  )
  assert config.seed == 7
  assert config.eval.source is None
  if isinstance(config, RunConfig):
    objectives.create(config.objective).check_vocabulary(20)


def test_the_table_has_every_objective():
  shown = {
    runs.config_values(entry, 0)["objective"]["name"]
    for entry in TABLE
    if entry.command == "train"
  }
  assert shown == set(objectives.OBJECTIVES)


def test_what_entries_read_is_made_once():
  for entry in ENTRIES.values():
    for name in entry.needs():
      assert tuple(ENTRIES[name].seeds) == (MAKER_SEED,)


def test_a_digest_says_what_is_computed(monkeypatch):
  entry = ENTRIES["tuned_gopd_1.25"]
  digest = runs.digest(entry, 0)
  assert digest == runs.digest(dataclasses.replace(entry, note="other"), 0)
  assert digest != runs.digest(entry, 1)
  faster = {**entry.values, "optimizer.learning_rate": 1.0}
  assert digest != runs.digest(dataclasses.replace(entry, values=faster), 0)
  # So does the teacher that another entry makes.
  teacher = ENTRIES["tuned"]
  longer = dataclasses.replace(teacher, values={"steps": 99})
  monkeypatch.setitem(ENTRIES, "tuned", longer)
  assert digest != runs.digest(entry, 0)


def test_outputs_stand_for_names(tmp_path):
  found = runs.resolved({"a": {"path": "@tuned"}, "b": [1, "x"]}, tmp_path)
  assert found["b"] == [1, "x"]
  expected = runs.folder(tmp_path, ENTRIES["tuned"], MAKER_SEED) / "export"
  assert found["a"]["path"] == str(expected)
  samples = runs.output(tmp_path, "teacher_samples")
  assert samples.endswith("/completions.parquet")


def test_collect_weighs_records_by_their_steps():
  records = [
    {"step": 0, "eval/accuracy": 0.5},
    {
      "step": 4,
      "time/step": 1.0,
      "rollout/tokens": 10.0,
      "optimizer/grad_norm": 2.0,
      "student/entropy": 0.123456789,
      "teacher/kl": 0.5,
    },
    {
      "step": 6,
      "time/step": 2.0,
      "rollout/tokens": 20.0,
      "optimizer/grad_norm": 1.0,
      "student/entropy": 0.5,
    },
  ]
  assert runs.collect(records) == {
    "steps": 6,
    "tokens": 4 * 10 + 2 * 20,
    "step_seconds": 4 * 1.0 + 2 * 2.0,
    "curve_steps": [4, 6],
    # The teacher's KL is not of all steps, so there is none.
    "curves": {"grad_norm": [2.0, 1.0], "entropy": [0.12346, 0.5]},
  }


def test_collect_counts_learned_tokens_of_fine_tuning():
  (one,) = [{"step": 5, "time/step": 1.0, "packing/learned": 7.0}]
  assert runs.collect([one])["tokens"] == 35


def test_missing_runs_come_by_turns(tmp_path):
  entries = [ENTRIES["opd_k1"], ENTRIES["opd_k2"]]
  done = [record("opd_k1", 0, [8]), record("opd_k2", 1, [8])]
  names = [(e.name, s) for e, s in results.missing(entries, done)]
  first, second = (e.seeds for e in entries)
  assert names[:3] == [("opd_k2", 0), ("opd_k1", 1), ("opd_k1", 2)]
  assert len(names) == len(first) + len(second) - 2
  # Another config is another run.
  stale = [{**done[0], "digest": "other"}]
  assert results.missing(entries[:1], stale)[0] == (entries[0], 0)


def test_results_survive_the_file_and_replace_their_own(tmp_path):
  file = tmp_path / "new" / "file.json"
  assert results.read(file) == Results()
  results.add(record("opd_k2", 0, [8]), file)
  results.add(record("opd_k1", 1, [8]), file)
  results.add(record("opd_k2", 0, [7]), file)
  found = results.read(file)
  assert [(r["entry"], r["right"]["test"]) for r in found.runs] == [
    ("opd_k1", [8]),
    ("opd_k2", [7]),
  ]
  timed = dataclasses.replace(found, timings={"milliseconds": {"gkd": 1.5}})
  results.write(timed, file)
  results.add(record("opd_k2", 1, [8]), file)
  assert results.read(file).timings == timed.timings


def test_a_run_that_ended_is_not_repeated(tmp_path, capsys):
  """Its record is taken from its folder; no process is started."""
  entry = dataclasses.replace(ENTRIES["opd_k1"], seeds=(0,))
  place = runs.folder(tmp_path, entry, 0)
  place.mkdir()
  made = record("opd_k1", 0, [8])
  (place / "record.json").write_text(json.dumps(made))
  file = tmp_path / "file.json"
  assert command.make([entry], tmp_path, file) == 0
  assert results.read(file).runs == [made]
  assert "opd_k1, seed 0" in capsys.readouterr().out
  assert command.make([entry], tmp_path, file) == 0
  assert capsys.readouterr().out == ""


ACCURACY = Comparison(first="opd_k1", second="opd_k2", expected="more")


def pairs(first, second):
  """Records of three seeds each, of 40 problems."""
  rng = np.random.default_rng(0)
  return [
    record(name, seed, rng.binomial(8, chance, 40).tolist())
    for seed in range(3)
    for name, chance in (("opd_k1", first), ("opd_k2", second))
  ]


@pytest.mark.parametrize(
  ("first", "second", "expected", "verdict"),
  [
    (0.5, 0.9, "more", "seen"),
    (0.5, 0.9, "less", "contradicted"),
    (0.9, 0.5, "more", "contradicted"),
    (0.9, 0.5, "less", "seen"),
    (0.9, 0.9, "more", "not seen"),
    (0.9, 0.9, "less", "not seen"),
    (0.5, 0.9, "at least as good", "seen"),
    (0.9, 0.5, "at least as good", "contradicted"),
    (0.5, 0.5, "at least as good", "not seen"),
    (1.0, 1.0, "at least as good", "seen"),
  ],
)
def test_verdicts(first, second, expected, verdict):
  comparison = dataclasses.replace(ACCURACY, expected=expected)
  found = claims.compare(comparison, pairs(first, second))
  assert found.verdict == verdict
  assert found.interval.low <= found.difference <= found.interval.high
  assert found.difference == pytest.approx(found.second - found.first)


def test_a_comparison_takes_the_seeds_that_both_have():
  records = pairs(0.5, 0.9)
  shared = [r for r in records if (r["entry"], r["seed"]) != ("opd_k2", 1)]
  assert claims.compare(ACCURACY, shared).seeds == [0, 2]
  assert claims.compare(ACCURACY, shared[:2]) is None
  assert claims.compare(ACCURACY, []) is None


def test_a_comparison_of_curves_is_of_their_means():
  comparison = dataclasses.replace(
    ACCURACY, quantity="grad_norm", expected="less"
  )
  records = [
    record("opd_k1", seed, [8], curves={"grad_norm": [2.0, 4.0 + seed]})
    for seed in range(3)
  ] + [
    record("opd_k2", seed, [8], curves={"grad_norm": [1.0, 3.0]})
    for seed in range(3)
  ]
  found = claims.compare(comparison, records)
  assert (found.first, found.second) == (3.5, 2.0)
  # -1, -1.5, -2: standard error 0.5 / sqrt(3), quantile 4.3027.
  half = 4.30265 * 0.5 / 3**0.5
  assert found.interval == pytest.approx((-1.5 - half, -1.5 + half), abs=1e-5)
  assert found.verdict == "seen"


def test_a_model_is_compared_with_every_run():
  records = [record("tuned", MAKER_SEED, [2, 4])] + [
    record("opd_k2", seed, [4, 6]) for seed in range(3)
  ]
  comparison = dataclasses.replace(ACCURACY, first="tuned")
  found = claims.compare(comparison, records)
  assert found.seeds == [0, 1, 2]
  assert (found.first, found.second) == (0.375, 0.625)


def test_every_comparison_names_entries_and_evaluations():
  for claim in claims.CLAIMS:
    for comparison in claim.comparisons:
      quantity = comparison.quantity
      for name in (comparison.first, comparison.second):
        levels = ENTRIES[name].levels
        assert quantity in runs.CURVES or comparison.problems in levels


def test_tables():
  found = Results(
    runs=[
      record("student", MAKER_SEED, [0, 8, 4, 4]),
      record("teacher", MAKER_SEED, [8, 8, 8, 8]),
      record("opd_k1", 0, [8, 8, 4, 4]),
      record("opd_k1", 1, [8, 8, 6, 6]),
      record("reopold_clip", 0, [8, 8, 4, 4]),
      record("reopold_clip", 1, [8, 8, 4, 4]),
    ],
    timings={
      "milliseconds": {"opd_k1": 123.4},
      "date": "2026-01-03",
      "commit": "def",
      "jax": "1",
      "python": "3",
      "device": "1 x cpu",
      "cores": 2,
    },
  )
  lines = tables.objectives(found).splitlines()
  assert len(lines) == 5
  assert len({line.count("|") for line in lines}) == 1
  cells = [cell.strip() for cell in lines[-1].split("|")[1:-1]]
  assert cells[0] == "`opd_k1`"
  assert cells[1].startswith("81.2 % (")
  assert cells[2].startswith("+31.2 (")
  assert cells[3:] == [
    "0.5000",
    "0.2500",
    "2, then 1",
    "1,000",
    "123",
    "2",
  ]
  shown = tables.claimed(found)
  assert shown.count("###") == 1
  assert "`opd_k1` 2" in shown
  assert "not seen, 2 seeds" in shown
  where = tables.circumstances(found)
  assert "2026-01-02, commit abc" in where
  assert "2026-01-03, commit def" in where


def test_notes_are_of_what_was_run():
  notes = tables.notes(Results(runs=[record("exopd", 0, [8])]))
  assert notes == f"- `exopd`: {ENTRIES['exopd'].note}."


def test_an_entry_finds_names_in_nested_values():
  entry = Entry(name="x", values={"a": {"b": {"path": "@y"}}, "c.d": "@z"})
  assert entry.needs() == {"y", "z"}
