"""Whether the student ends its completions."""

import json

import numpy as np
import pytest

from opd_jax import preflight, setup
from opd_jax.preflight import probe
from tests.preflight.support import change_embedding, config_of, inspect, only


def test_the_probe_measures_the_stop_ids(folder):
  # All ids alike: 2 of 32 stop, whatever came before.
  change_embedding(folder, lambda rows: np.full_like(rows, 0.5))
  config = config_of(folder, sampling={"max_new_tokens": 24})
  report = inspect(config, with_probe=True)
  figures = report.figures()["probe"]
  assert figures["stop_probability"] == pytest.approx(2 / 32, rel=1e-5)
  assert figures["samples"] == 10
  assert 0 < figures["stopped"] <= 10
  assert not report.findings
  assert "completion 0" in "\n".join(report.sections[-1].lines)


def test_the_probe_takes_prompts_of_all_sources(folder):
  """In turn, and more of the others where one has no more."""
  sources = {}
  for name, text, rows in (("a", "a", 30), ("b", "bb", 3), ("c", "ccc", 30)):
    file = folder / f"{name}.jsonl"
    file.write_text(json.dumps({"text": text}) + "\n")
    file.write_text(file.read_text() * rows)
    sources[name] = {"path": str(file)}
  data = {"sources": sources, "max_prompt_tokens": 3}
  prepared = setup.prepare(config_of(folder, data=data, held_out={}))
  batch = probe._prompts(prepared)
  letters = prepared.tokenizer.encode("abc", special_tokens=False)
  drawn = [
    "abc"[letters.index(row[n - 1])]
    for row, n in zip(*_arrays(batch), strict=True)
  ]
  assert "".join(drawn) == "abcabcabcacacaca"
  # The end of <s>ccc, as in the run.
  assert batch.tokens[2].tolist() == [letters[2]] * 3


def _arrays(batch):
  return np.asarray(batch.tokens), np.asarray(batch.lengths)


def test_a_student_that_never_ends(folder):
  def shy(rows):
    rows *= 50.0
    rows[[2, 5]] = 1e-3
    return rows

  change_embedding(folder, shy)
  config = config_of(folder, sampling={"max_new_tokens": 24})
  only(
    inspect(config, with_probe=True),
    "eos_never_drawn",
    "none of 10 completions of 24 tokens",
    "(2 '</s>', 5 'c')",
    "opd-jax sft",
    "sampling.max_new_tokens = 24",
    "sampling.stop_ids to ()",
  )


def test_cut_completions_leave_it_open(good):
  prepared = setup.prepare(config_of(good))
  ends = preflight.probe.Ends(
    samples=16,
    stopped=0,
    length=256,
    full_length=2048,
    mean_length=256.0,
    stop_probability=1e-3,
  )
  (found,) = preflight.probe.findings(prepared, ends)
  assert found.name == "eos_unclear"
  assert found.severity == "warning"
  assert "sampling.max_new_tokens = 2048" in found.message
