"""Evaluation: who draws what, what is counted, and what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from opd_jax import evaluate, generate, tokenizer
from opd_jax.config import EvalConfig, SamplingConfig, TemplateConfig
from opd_jax.errors import InputError
from opd_jax.evaluate import Evaluator
from opd_jax.generate import Completion
from opd_jax.models import Model, hf
from opd_jax.parsing import parse
from opd_jax.sharding import DECODE_RULES, TRAIN_RULES, Layout, make_mesh
from opd_jax.verifiers import Verifier
from tests import pair

LENGTH = 10


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
  """A pair, and questions whose answer is a letter."""
  folder = pair.write_pair(tmp_path_factory.mktemp("evaluate"))
  rows = [
    {"question": "x" * (index % 3) + letter, "answer": letter}
    for index, letter in enumerate("abcdefghij")
  ]
  (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
  return folder


@pytest.fixture(autouse=True)
def letters(monkeypatch):
  """A verifier that a model of random weights meets now and then."""
  verifier = Verifier(
    name="letters",
    function=lambda completion, answer: answer in completion,
    vote=lambda completion: completion[:1] or None,
  )
  monkeypatch.setitem(evaluate.verifiers.VERIFIERS, "letters", verifier)


def config_of(folder, **changes):
  source = {
    "path": str(folder / "questions.jsonl"),
    "prompt": {"text": "{question}"},
  }
  return parse(
    EvalConfig,
    {
      "source": {**source, **changes.pop("source", {})},
      "samples": 3,
      "verifier": "letters",
      "batch": 4,
      **changes,
    },
    "eval.",
  )


def prepare(folder, sampling=None, **changes):
  config = config_of(folder, **changes)
  return evaluate.prepare(
    config,
    sampling or SamplingConfig(max_new_tokens=LENGTH),
    tokenizer.load(folder / "student"),
    hf.read_config(folder / "student"),
  )


def model_of(folder, rules, sizes, devices):
  mesh = make_mesh(sizes, jax.devices()[:devices])
  architecture = hf.read_config(folder / "student")
  return Model(architecture, Layout.create(mesh, rules))


@pytest.fixture(scope="session")
def one_device(folder):
  """The decoder on one device, and its weights."""
  model = model_of(folder, DECODE_RULES, {}, 1)
  return model, hf.load(folder / "student", model)


@pytest.fixture(scope="session")
def ask(folder, one_device):
  """A report by one device; each evaluation is made once."""
  found = {}
  model, params = one_device

  def ask(**changes):
    key = json.dumps(changes)
    if key not in found:
      found[key] = Evaluator(prepare(folder, **changes), model)(params)
    return found[key]

  return ask


def texts(report):
  return [[one.text for one in group] for group in report.completions]


def tokens(report):
  return [[one.tokens for one in group] for group in report.completions]


def test_it_counts_what_the_verifier_says(ask):
  report = ask()
  assert np.shape(report.completions) == report.scores.shape == (10, 3)
  hits = [
    [letter in text for text in group]
    for letter, group in zip("abcdefghij", texts(report), strict=True)
  ]
  np.testing.assert_array_equal(report.scores, hits)
  # Otherwise the comparisons below say little.
  assert 0.1 < report.scores.mean() < 0.9
  metrics = report.metrics()
  assert metrics["eval/accuracy"] == pytest.approx(np.mean(hits))
  assert metrics["eval/accuracy_low"] < metrics["eval/accuracy"]
  assert metrics["eval/accuracy_high"] > metrics["eval/accuracy"]
  drawn = [one for group in report.completions for one in group]
  stopped = [one.tokens[-1] in (2, 5) for one in drawn]
  assert [one.stopped for one in drawn] == stopped
  assert metrics["eval/truncated"] == pytest.approx(1 - np.mean(stopped))
  assert 0 < metrics["eval/truncated"] < 1
  assert metrics["eval/length_mean"] == pytest.approx(
    np.mean([len(one.tokens) for one in drawn])
  )
  assert set(metrics) == {
    *("eval/accuracy", "eval/accuracy_low", "eval/accuracy_high"),
    *("eval/pass_at_1", "eval/pass_at_2", "eval/maj_at_3"),
    *("eval/truncated", "eval/length_mean"),
  }


def test_the_same_seed_is_the_same_evaluation(folder, one_device, ask):
  model, params = one_device
  again = Evaluator(prepare(folder), model)(params)
  assert again.completions == ask().completions
  assert again.metrics() == ask().metrics()
  assert tokens(ask(seed=1)) != tokens(ask())


def test_the_batch_does_not_matter(ask):
  for batch in (8, 100):
    report = ask(batch=batch)
    assert tokens(report) == tokens(ask())
    assert report.metrics() == ask().metrics()


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}])
def test_the_mesh_does_not_matter(folder, ask, sizes):
  """From weights in the training layout, as during a run."""
  train = model_of(folder, TRAIN_RULES, sizes, 8)
  params = hf.load(folder / "student", train)
  decoder = model_of(folder, DECODE_RULES, sizes, 8)
  report = Evaluator(prepare(folder), decoder)(params)
  assert tokens(report) == tokens(ask())
  assert report.metrics() == ask().metrics()


def test_more_samples_and_more_rows_leave_the_first_as_they_are(ask):
  more = ask(samples=5)
  fewer = ask(source={"rows": 6})
  for group, before in zip(tokens(more), tokens(ask()), strict=True):
    assert group[:3] == before
  assert tokens(fewer) == tokens(ask())[:6]


def test_new_weights_need_no_new_program(folder, one_device, monkeypatch):
  model, params = one_device
  evaluator = Evaluator(prepare(folder), model)
  first = evaluator(params)

  def fail(*arguments):
    pytest.fail("traced again")

  monkeypatch.setattr(generate.sampling, "sample", fail)
  other = jax.tree.map(lambda leaf: leaf * 0.5, params)
  assert tokens(evaluator(other)) != tokens(first)
  assert tokens(evaluator(params)) == tokens(first)


def test_weights_are_brought_into_the_compute_dtype(folder, ask):
  model = dataclasses.replace(
    model_of(folder, DECODE_RULES, {}, 1), compute_dtype="bfloat16"
  )
  problems = prepare(folder)
  masters = hf.load(folder / "student", model)
  assert not model.is_working_copy(masters)
  from_masters = Evaluator(problems, model)(masters)
  copy = jax.jit(model.working_copy)(masters)
  assert model.is_working_copy(copy)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(copy)} == {
    "bfloat16",
    "float32",
  }
  assert tokens(Evaluator(problems, model)(copy)) == tokens(from_masters)
  assert tokens(from_masters) != tokens(ask())


def report_of(folder, groups, **changes):
  """A report of given texts; "." at the end is a stop."""
  problems = prepare(
    folder, samples=len(groups[0]), source={"rows": len(groups)}, **changes
  )
  completions = tuple(
    tuple(
      Completion(
        prompt="",
        text=text,
        tokens=tuple(range(len(text))),
        logprobs=(),
        stopped=text.endswith("."),
      )
      for text in group
    )
    for group in groups
  )
  return evaluate.judge(problems, completions)


def test_metrics_by_hand(folder):
  """Answers are "a" and "b"; a vote is the first letter."""
  groups = (("a.", "a.", "b.", "ca"), ("a.", "c.", "c.", "b"))
  report = report_of(folder, groups, pass_at=(1, 2, 4))
  metrics = report.metrics()
  assert metrics["eval/accuracy"] == metrics["eval/pass_at_1"] == 4 / 8
  # Of the 6 pairs, 6 have one of 3 right, and 3 have the one of 1.
  assert metrics["eval/pass_at_2"] == pytest.approx((6 / 6 + 3 / 6) / 2)
  assert metrics["eval/pass_at_4"] == 1
  assert metrics["eval/maj_at_4"] == 1 / 2
  assert metrics["eval/truncated"] == 2 / 8
  assert metrics["eval/length_mean"] == 15 / 8
  rows = list(report.rows())
  assert rows[1]["answer"] == "b"
  assert [one["score"] for one in rows[1]["completions"]] == [0, 0, 0, 1]


def test_without_votes_there_is_no_majority(folder, monkeypatch):
  half = Verifier(name="half", function=lambda *_: 0.5, vote=None)
  monkeypatch.setitem(evaluate.verifiers.VERIFIERS, "half", half)
  metrics = report_of(folder, (("a.", "b."),), verifier="half").metrics()
  assert not any("maj" in name for name in metrics)
  # A partial score counts for the mean, not as right.
  assert metrics["eval/accuracy"] == 0.5
  assert metrics["eval/pass_at_2"] == 0


def test_a_template_in_place_of_the_sources(folder):
  problems = evaluate.prepare(
    config_of(folder),
    SamplingConfig(max_new_tokens=LENGTH),
    tokenizer.load(folder / "student"),
    hf.read_config(folder / "student"),
    TemplateConfig(text="is it {question}"),
  )
  assert problems.prompts.prompts[0].text == "is it a"
  assert problems.answers[0] == "a"


def test_the_configs_sampling_comes_first(folder):
  sampling = {"max_new_tokens": 5, "temperature": 0.5, "stop_ids": (7,)}
  prompts = prepare(folder).prompts
  assert prompts.sampling.max_new_tokens == LENGTH
  assert prompts.stop_ids == (2, 5)
  config = config_of(folder)
  own = dataclasses.replace(config, sampling=SamplingConfig(**sampling))
  prompts = evaluate.prepare(
    own,
    SamplingConfig(),
    tokenizer.load(folder / "student"),
    hf.read_config(folder / "student"),
  ).prompts
  assert prompts.sampling.temperature == 0.5
  assert prompts.stop_ids == (7,)


@pytest.mark.parametrize(
  ("changes", "parts"),
  [
    ({"pass_at": (1, 4)}, ["[1, eval.samples = 3], got 4", "raise"]),
    ({"samples": 0}, ["eval.samples must be >= 1, got 0"]),
    ({"samples": 5000}, ["at most 2,048, got 5,000"]),
    ({"verifier": "letter"}, ["'letter'", "known: exact, number"]),
    ({"verifier": "nowhere:f"}, ["'nowhere' cannot be imported"]),
    ({"verifier": "number"}, ["line 1", "'a' has no number"]),
    ({"source": {"path": "nowhere.jsonl"}}, ["nowhere.jsonl"]),
    (
      {"source": {"prompt": {"text": "{query}"}}},
      ["line 1", "no field 'query'", "the row has question, answer"],
    ),
    ({"source": {"answer": "{solution}"}}, ["line 1", "no field 'solution'"]),
    (
      {"source": {"prompt": {"text": "{question}" + 54 * "x"}}},
      [
        "the prompt of",
        "line 2",
        "57 tokens",
        "= 8",
        "window of 64",
        "shorten",
      ],
    ),
  ],
)
def test_what_is_refused(folder, changes, parts):
  sampling = SamplingConfig(max_new_tokens=8)
  with pytest.raises(InputError) as raised:
    prepare(folder, sampling, **changes)
  assert all(part in str(raised.value) for part in parts), raised.value
