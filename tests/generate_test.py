"""Completions from the command line, against those of transformers."""

import json

import numpy as np
import pytest

from opd_jax import cli
from opd_jax.models import hf

MODELS = ("babyllama-student", "babyllama-teacher")


def generate(model, *flags):
  return cli.main(["generate", f"--model={model}", *flags])


@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_that_of_transformers(name, shared_data, tmp_path, capfd):
  model = shared_data / "models" / name
  wanted = json.loads((model / "reference.json").read_text())["greedy"]
  prompts = [f"--prompt={case['prompt']}" for case in wanted]
  out = tmp_path / "new" / "out.json"
  flags = ["--temperature=0", "--max_new_tokens=48", f"--json={out}"]
  assert generate(model, *prompts, *flags) == 0
  assert capfd.readouterr().out.splitlines() == [
    case["completion"] for case in wanted
  ]
  found = json.loads(out.read_text())
  for got, want in zip(found, wanted, strict=True):
    assert got["prompt"] == want["prompt"]
    assert got["tokens"] == want["completion_ids"]
    # The reference is rounded to five digits.
    np.testing.assert_allclose(got["logprobs"], want["logprobs"], atol=1e-4)
    assert got["stopped"] == (got["tokens"][-1] in (1, 2))


def test_the_seed_says_what_is_drawn(shared_data, capfd):
  model = shared_data / "models" / "babyllama-student"
  prompts = ["--prompt=Once upon a time", "--prompt=Lily had a cat"]

  def text(*flags):
    assert generate(model, *prompts, "--max_new_tokens=8", *flags) == 0
    return capfd.readouterr().out.splitlines()

  first = text("--samples=2")
  assert text("--samples=2", "--seed=0") == first
  assert text("--samples=2", "--seed=1") != first
  assert [line[:4] for line in first] == ["Once", "Once", "Lily", "Lily"]
  assert first[0] != first[1]
  assert text("--samples=2", "--tensor=2", "--seed=0") == first


@pytest.mark.parametrize(
  ("flags", "parts"),
  [
    (["--dtype=float16"], ["float16", "float32|bfloat16"]),
    (["--samples=0"], ["--samples must be >= 1, got 0"]),
    (["--temperature=-1"], ["temperature must be >= 0, got -1"]),
    (["--top_p=1.5"], ["top_p must be in (0, 1], got 1.5"]),
    (["--top_k=1000000"], ["top_k must be in [1, V=", "got 1000000"]),
    (["--max_new_tokens=100000"], ["window of", "'Once'", "shorten"]),
    (["--tensor=9"], ["tensor must be in [1, 8]", "got 9"]),
    (["--tensor=3"], ["not divisible by the 3 shards", "choose"]),
    (["--json=tests"], ["--json=tests is a folder"]),
    (["--json=pyproject.toml/x"], ["pyproject.toml is a file"]),
    (["--model=nowhere"], ["'nowhere'", "give a folder"]),
  ],
)
def test_a_mistake_is_one_line_before_the_weights_are_read(
  flags, parts, shared_data, capfd, monkeypatch
):
  monkeypatch.setattr(hf, "load", lambda *_: pytest.fail("read the weights"))
  model = shared_data / "models" / "babyllama-student"
  assert generate(model, "--prompt=Once", *flags) == 2
  out, err = capfd.readouterr()
  (line,) = err.splitlines()
  assert line.startswith("opd-jax: error: ")
  assert all(part in line for part in parts), line
  assert not out
