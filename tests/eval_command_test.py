"""`opd-jax eval`, and `opd-jax generate` on a whole source."""

import datetime
import decimal
import json
import shutil
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from opd_jax import cli
from opd_jax.cli import generate
from opd_jax.models import hf
from tests import pair

VERIFIER = """\
def letters(completion, answer):
  return answer in completion


letters.vote = lambda completion: completion[:1] or None
"""
CONFIG = """\
import json
import pathlib


def get_config(file):
  return json.loads(pathlib.Path(file).read_text())
"""


@pytest.fixture(scope="session")
def home(tmp_path_factory):
  """A pair, questions, a verifier, and a run that was evaluated on neither."""
  home = pair.write_pair(tmp_path_factory.mktemp("home"))
  rows = [
    {"question": "x" * (index % 3) + letter, "answer": letter, "id": index}
    for index, letter in enumerate("abcdef")
  ]
  (home / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
  (home / "odd.jsonl").write_text(
    '{"q": "a", "note": "b"}\n{"q": "a", "note": "\\ud800"}\n'
  )
  odd = pa.table({"q": ["a"], "note": pa.array([b"\xff"], pa.binary())})
  pq.write_table(odd, home / "odd.parquet")
  (home / "letter_verifier.py").write_text(VERIFIER)
  (home / "config.py").write_text(CONFIG)
  values = pair.config_of(
    home,
    batch={"prompts": 8},
    optimizer={"learning_rate": 0.05},
    held_out={},
    eval={
      "source": {
        "path": str(home / "questions.jsonl"),
        "prompt": {"text": "is it {question}"},
      },
      "samples": 3,
      "verifier": "letter_verifier:letters",
      "sampling": {"max_new_tokens": 7, "top_k": 20},
      "seed": 5,
    },
    steps=2,
  )
  (home / "config.json").write_text(json.dumps(values))
  return home


@pytest.fixture(autouse=True)
def in_the_folder(home, monkeypatch):
  monkeypatch.chdir(home)
  monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture(scope="session")
def run(home):
  """The folder of a run of two large steps."""
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(home)
    patch.setattr(sys, "path", [*sys.path])
    command = [f"--config={home}/config.py:{home}/config.json"]
    assert cli.main(["train", *command, f"--workdir={home}/run"]) == 0
  return home / "run"


def evaluated(tmp_path, *flags):
  out = tmp_path / "new" / "out.json"
  assert cli.main(["eval", *flags, f"--json={out}"]) == 0
  return json.loads(out.read_text())


def test_a_run_and_its_export_are_the_same(home, run, tmp_path, capfd):
  capfd.readouterr()
  of_run = evaluated(tmp_path, f"--model={run}")
  printed = capfd.readouterr().out
  exported = [f"--model={run}/export", "--config=config.py:config.json"]
  of_export = evaluated(tmp_path, *exported)
  assert of_run["step"] == 2
  assert of_export["step"] is None
  for name in ("rows", "metrics", "estimates", "config", "problems"):
    assert of_run[name] == of_export[name]
  # The run's own source, template, verifier, seed and sampling.
  assert [row["prompt"] for row in of_run["rows"]][:2] == [
    "is it a",
    "is it xb",
  ]
  assert of_run["config"]["sampling"]["top_k"] == 20
  assert of_run["config"]["seed"] == 5
  assert (
    max(one["tokens"] for row in of_run["rows"] for one in row["completions"])
    == 7
  )
  # What the run has logged of these weights, drawn on another mesh.
  lines = (run / "metrics.jsonl").read_text().splitlines()
  logged = [r for r in map(json.loads, lines) if "eval/accuracy" in r]
  assert [record.pop("step") for record in logged] == [0, 2]
  assert logged[1] == pytest.approx(of_run["metrics"])
  assert evaluated(tmp_path, f"--model={run}", "--step=best") == of_run
  # The weights it was trained to, not those it began with.
  first = [f"--model={home}/student", "--config=config.py:config.json"]
  assert evaluated(tmp_path, *first)["rows"] != of_run["rows"]

  lines = printed.splitlines()
  assert "run after step 2: 6 problems of" in lines[0]
  assert "x 3 samples, verifier letter_verifier:letters" in lines[0]
  assert "temperature 1, top_k 20, at most 7 new tokens" in lines[1]
  assert "seed 5" in lines[1]
  figures = {line.split()[0]: line.split()[1] for line in lines[4:10]}
  assert list(figures) == [
    *("avg@3", "pass@1", "pass@2", "maj@3", "truncated", "length")
  ]
  for name, estimate in of_run["estimates"].items():
    assert float(figures[name]) == pytest.approx(
      100 * estimate["value"], abs=0.1
    )
    assert estimate["low"] < estimate["high"]
  scores = [
    [one["score"] for one in row["completions"]] for row in of_run["rows"]
  ]
  assert of_run["estimates"]["avg@3"]["value"] == pytest.approx(np.mean(scores))
  assert printed.count("score") == 3
  assert f"  is it a{of_run['rows'][0]['completions'][0]['text']}" in printed


def test_a_run_of_sft_too(home, tmp_path, capfd):
  """From random weights: there are none beside its config.json."""
  start = tmp_path / "start"
  shutil.copytree(home / "student", start)
  (start / "model.safetensors").unlink()
  source = {
    "path": str(home / "questions.jsonl"),
    "prompt": {"text": "{question}"},
    "completion": "{answer}",
  }
  values = {
    "student": {"path": str(start), "init": "random"},
    "data": {"sources": {"letters": source}},
    "batch": {"rows": 8, "row_tokens": 8},
    "optimizer": {"learning_rate": 0.05},
    "eval": {
      "source": source,
      "verifier": "letter_verifier:letters",
      "sampling": {"max_new_tokens": 5},
    },
    "preflight": {"allow": ["eval_rows_in_training"]},
    "steps": 2,
  }
  file, run = tmp_path / "sft.json", tmp_path / "run"
  file.write_text(json.dumps(values))
  command = [f"--config=config.py:{file}", f"--workdir={run}"]
  assert cli.main(["sft", *command]) == 0
  of_run = evaluated(tmp_path, f"--model={run}")
  exported = [f"--model={run}/export", f"--config=config.py:{file}"]
  of_export = evaluated(tmp_path, *exported)
  assert of_run["step"] == 2
  assert of_run["rows"] == of_export["rows"]
  assert of_run["config"]["samples"] == 4


def test_the_exported_weights_are_those_of_the_run(run, tmp_path, capfd):
  out = tmp_path / "out"
  command = ["export", f"--workdir={run}", f"--out={out}", "--step=2"]
  assert cli.main(command) == 0
  got, want = (
    load_file(folder / "model.safetensors") for folder in (out, run / "export")
  )
  for name, value in want.items():
    np.testing.assert_array_equal(got[name], value)


def test_flags_go_before_the_run(home, run, tmp_path):
  found = evaluated(
    tmp_path,
    f"--model={run}",
    *("--samples=2", "--rows=2", "--temperature=0", "--verifier=exact"),
    *("--prompt={id}{question}", "--answer={question}", "--pass_at=2"),
    *("--max_new_tokens=3", "--tensor=2", "--dtype=bfloat16"),
  )
  assert [row["prompt"] for row in found["rows"]] == ["0a", "1xb"]
  assert [row["answer"] for row in found["rows"]] == ["a", "xb"]
  assert list(found["estimates"]) == ["avg@2", "pass@2", "maj@2"]
  assert found["config"]["sampling"]["top_k"] == 20
  for row in found["rows"]:
    one, other = row["completions"]
    assert one == other
    assert one["tokens"] <= 3


def test_data_by_itself(tmp_path):
  found = evaluated(
    tmp_path,
    *("--model=student", "--data=questions.jsonl", "--samples=2"),
    *("--verifier=letter_verifier:letters", "--max_new_tokens=4"),
  )
  assert [row["prompt"] for row in found["rows"]][:2] == ["a", "xb"]
  assert found["config"]["sampling"]["top_k"] is None


def test_generate_writes_a_row_per_completion(run, tmp_path, capfd):
  out = tmp_path / "new" / "out.jsonl"
  flags = ["--data=questions.jsonl", f"--out={out}", "--samples=3", "--batch=4"]
  flags += ["--max_new_tokens=6", "--prompt={question}?"]
  assert cli.main(["generate", f"--model={run}", *flags]) == 0
  assert capfd.readouterr().out == f"wrote 18 completions to {out}\n"
  rows = [json.loads(line) for line in out.read_text().splitlines()]
  assert [row["id"] for row in rows] == [i for i in range(6) for _ in range(3)]
  assert rows[3]["prompt"] == "xb?"
  assert set(rows[0]) == {
    *("question", "answer", "id", "prompt", "completion", "stopped", "logprob")
  }
  assert all(row["logprob"] < 0 for row in rows)
  kinds = {row["stopped"] for row in rows}
  assert kinds == {True, False}

  assert cli.main(["generate", f"--model={run}", *flags, "--stopped_only"]) == 0
  stopped = [json.loads(line) for line in out.read_text().splitlines()]
  assert stopped == [row for row in rows if row["stopped"]]
  assert [file.name for file in out.parent.iterdir()] == ["out.jsonl"]


def test_rows_with_dates_and_decimals(tmp_path):
  """Text in the template, for the verifier, and in what is written."""
  day, price = datetime.date(2024, 2, 29), decimal.Decimal("12.50")
  table = pa.Table.from_pylist([{"q": "a", "answer": price, "day": day}])
  pq.write_table(table, tmp_path / "rows.parquet")
  out = tmp_path / "out.jsonl"
  data = [f"--data={tmp_path}/rows.parquet", "--max_new_tokens=2"]
  flags = [*data, "--prompt={q} {day}", f"--out={out}"]
  assert cli.main(["generate", "--model=student", *flags]) == 0
  (row,) = map(json.loads, out.read_text().splitlines())
  assert (row["prompt"], row["answer"], row["day"]) == (
    *("a 2024-02-29", "12.50", "2024-02-29"),
  )
  flags = ["--model=student", *data, "--prompt={q}", "--verifier=number"]
  assert evaluated(tmp_path, *flags)["rows"][0]["answer"] == "12.50"


def test_no_half_of_a_file_is_left(tmp_path):
  def rows():
    yield {"a": 1}
    raise FloatingPointError

  with pytest.raises(FloatingPointError):
    generate._write_rows(str(tmp_path / "out.jsonl"), rows())
  assert not list(tmp_path.iterdir())


BAD = {
  "no model": (["--data=x.jsonl"], ["eval needs --model"]),
  "nothing to evaluate on": (["--model=student"], ["--data", "eval.source"]),
  "k beyond the samples": (
    ["--model=student", "--data=questions.jsonl", "--pass_at=1,8"],
    ["eval.pass_at", "[1, eval.samples = 4], got 8", "raise eval.samples"],
  ),
  "k is no number": (
    ["--model=student", "--data=questions.jsonl", "--pass_at=1,x"],
    ["--pass_at", "got '1,x'"],
  ),
  "unknown data": (
    ["--model=student", "--data=nowhere.jsonl"],
    ["nowhere.jsonl"],
  ),
  "no such field": (
    ["--model=student", "--data=questions.jsonl", "--prompt={query}"],
    ["line 1", "no field 'query'", "has question, answer, id"],
  ),
  "no such answer": (
    ["--model=student", "--data=questions.jsonl", "--answer={solution}"],
    ["line 1", "no field 'solution'"],
  ),
  "verifier unknown": (
    ["--model=student", "--data=questions.jsonl", "--verifier=maths"],
    ["'maths'", "known: exact, number", "module:function"],
  ),
  "verifier not importable": (
    ["--model=student", "--data=questions.jsonl", "--verifier=nowhere:f"],
    ["'nowhere' cannot be imported", "without .py"],
  ),
  "verifier for other answers": (
    ["--model=student", "--data=questions.jsonl"],
    ["line 1", "'a' has no number", '"exact"'],
  ),
  "no chat template": (
    ["--model=student", "--data=questions.jsonl", "--chat"],
    ["no chat template"],
  ),
  "system without chat": (
    ["--model=student", "--data=questions.jsonl", "--system=x"],
    ["prompt.system = 'x'", "prompt.chat"],
  ),
  "window": (
    ["--model=student", "--data=questions.jsonl", "--verifier=exact"],
    ["the prompt of", "line 1", "window of 64", "shorten"],
  ),
  "step of no run": (
    ["--model=student", "--step=best", "--data=questions.jsonl"],
    ["student is none", "workdir"],
  ),
  "tensor": (
    [
      *("--model=student", "--data=questions.jsonl", "--verifier=exact"),
      *("--max_new_tokens=4", "--tensor=9"),
    ],
    ["tensor must be in [1, 8]"],
  ),
  "json is a folder": (["--model=student", "--json=."], ["--json=."]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line(case, capfd, monkeypatch):
  arguments, parts = BAD[case]
  refused(["eval", *arguments], parts, capfd, monkeypatch)


def refused(arguments, parts, capfd, monkeypatch):
  monkeypatch.setattr(hf, "load", lambda *_: pytest.fail("read the weights"))
  assert cli.main(arguments) == 2
  out, err = capfd.readouterr()
  (line,) = err.splitlines()
  assert line.startswith("opd-jax: error: ")
  assert all(part in line for part in parts), line
  assert not out


@pytest.mark.parametrize(
  ("flags", "parts"),
  [
    ([], ["--prompt=TEXT, or --data=FILE and --out=FILE"]),
    (["--data=questions.jsonl"], ["--data needs --out too"]),
    (["--prompt=x", "--out=x.jsonl"], ["--out needs --data too"]),
    (
      ["--data=questions.jsonl", "--out=o", "--prompt=a", "--prompt=b"],
      ["one --prompt", "got 2"],
    ),
    (["--data=questions.jsonl", "--out=."], ["--out=. is a folder"]),
    (
      ["--data=questions.jsonl", "--out=o", "--prompt={query}"],
      ["no field 'query'"],
    ),
    (
      ["--data=odd.jsonl", "--out=o", "--prompt={q}"],
      ["odd.jsonl, line 2", "field 'note' cannot be written", "surrogates"],
    ),
    (
      ["--data=odd.parquet", "--out=o", "--prompt={q}"],
      ["odd.parquet, row 1", "field 'note'", "bytes", "leave the field out"],
    ),
    (["--prompt=x", "--batch=0"], ["--batch must be >= 1, got 0"]),
  ],
)
def test_a_mistake_in_generate(flags, parts, capfd, monkeypatch):
  refused(["generate", "--model=student", *flags], parts, capfd, monkeypatch)


def test_a_bad_step_of_a_run(run, capfd, monkeypatch):
  model = [f"--model={run}"]
  capfd.readouterr()
  for step, part in (
    ("7", "steps there: 2"),
    ("-1", "latest, best or a number, got '-1'"),
  ):
    assert cli.main(["eval", *model, f"--step={step}"]) == 2
    out, err = capfd.readouterr()
    assert part in err
    assert not out
