"""Verifiers: what counts as right, and what a user's own may do wrong."""

import json
import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest

from opd_jax import verifiers
from opd_jax.errors import InputError

NUMBERS = {
  "5": 5,
  "The answer is 5.": 5,
  "-5": -5,
  "−5": -5,
  "x = -7": -7,
  "f(-2)": -2,
  "10-3": 3,
  "10 - 3 = 7": 7,
  "f(2)-3": 3,
  "pages 3-5": 5,
  "1.50": Fraction(3, 2),
  ".5": Fraction(1, 2),
  "0.1": Fraction(1, 10),
  "1,234": 1234,
  "1,234,567.5": Fraction(2469135, 2),
  "1, 2, 3": 3,
  "[1,2,3]": 3,
  "1{,}234": 1234,
  r"1\,000": 1000,
  "$5": 5,
  r"\$1,234.00 dollars": 1234,
  "-$5": -5,
  "$-5": -5,
  "€3": 3,
  "50%": 50,
  r"50\%": 50,
  "12km": 12,
  "**42**": 42,
  "3/4": Fraction(3, 4),
  "-3/4": Fraction(-3, 4),
  "12 / 4": 3,
  "1 3/4": Fraction(7, 4),
  "-1 3/4": Fraction(-7, 4),
  r"\frac{3}{4}": Fraction(3, 4),
  r"-\dfrac{3}{4}": Fraction(-3, 4),
  r"1\frac12": Fraction(3, 2),
  r"\approx5": 5,
  "2.5e-3": Fraction(1, 400),
  "1e3": 1000,
  "5 apples and 3 pears": 3,
  r"\boxed{12} is right, not 13": 12,
  r"\boxed{1} or \boxed{\frac{3}{4}}": Fraction(3, 4),
  r"\boxed{x = 5": 5,
  "#### 7\n\nQuestion: what is 8?": 7,
  "a #### 1 b #### 1,234": 1234,
  r"#### \boxed{5}": 5,
  r"\boxed{5} #### 6": 6,
  r"#### 1, no: \boxed{6}": 6,
  "due on 12/25/2020": 2020,
  # No number.
  "": None,
  "none": None,
  "x2 and H2O": None,
  "so 3 #### ": None,
  r"3 is \boxed{}": None,
  "1/0": None,
  "9" * 5000: None,
  "٣": None,
}


@pytest.mark.parametrize("text", NUMBERS, ids=lambda text: text[:30])
def test_last_number(text):
  assert verifiers.last_number(text) == NUMBERS[text]


@pytest.mark.parametrize(
  ("completion", "answer", "right"),
  [
    (" 1.50 dollars", "1.5", True),
    ("so it is 6/8", "3/4", True),
    ("0.333", "1/3", False),
    # As floats these would be equal.
    ("0.1000000000000000000001", "0.1", False),
    ("50%", "50", True),
    ("50%", "0.5", False),
    ("5", "-5", False),
    ("five", "5", False),
    ("", "5", False),
  ],
)
def test_number(completion, answer, right):
  number = verifiers.load("number")
  assert number.score(completion, answer, "row") == right


def test_number_wants_one_in_the_answer():
  with pytest.raises(InputError, match=r"a.jsonl, line 3: .*'five' has no num"):
    verifiers.load("number").score("5", "five", "a.jsonl, line 3")


def test_exact():
  exact = verifiers.load("exact")
  assert exact.score(" Yes\n", "Yes", "row") == 1
  assert exact.score("Yes.", "Yes", "row") == 0
  assert exact.vote_of(" Yes\n", "row") == "Yes"
  assert exact.vote_of(" \n", "row") is None


def test_number_on_all_answers_of_gsm8k(shared_data):
  """What stands behind "####" is a plain integer in all of them."""
  lines = (shared_data / "gsm8k" / "test.jsonl").read_text().splitlines()
  number = verifiers.load("number")
  answers = [json.loads(line)["answer"] for line in lines]
  assert len(answers) == 1319
  for answer in answers:
    wanted = answer.rpartition("#### ")[2]
    value = int(wanted.replace(",", ""))
    assert number.vote_of(answer, "row") == value
    for written in (
      wanted,
      f"The answer is ${value:,}.00.",
      f"so \\boxed{{{wanted}}} in 2 weeks",
      f"{2 * value}/2",
    ):
      assert number.score(written, answer, "row") == 1, (written, answer)
    assert number.score(f"It is {value + 1}", answer, "row") == 0


@pytest.fixture
def own(tmp_path, monkeypatch):
  """Verifiers in a file of the current folder."""
  (tmp_path / "own_verifiers.py").write_text(
    "import numpy as np\n"
    "def length(completion, answer):\n"
    "  return len(completion) / 4\n"
    "def starts(completion, answer):\n"
    "  return np.bool_(completion[0] == answer)\n"
    "def word(completion, answer):\n"
    "  return 'yes'\n"
    "def nothing(completion, answer):\n"
    "  return float('nan')\n"
    "def single(completion):\n"
    "  return True\n"
    "def listed(completion, answer):\n"
    "  return completion == answer\n"
    "listed.vote = list\n"
    "def paired(completion, answer):\n"
    "  return completion == answer\n"
    "paired.vote = lambda completion: (1, [completion])\n"
    "def leaves(completion, answer):\n"
    "  raise SystemExit(f'no {answer}')\n"
    "LIMIT = 3\n"
  )
  (tmp_path / "broken_verifier.py").write_text("import nowhere_to_be_found\n")
  (tmp_path / "leaving_verifier.py").write_text("import sys\nsys.exit(3)\n")
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "path", [*sys.path])
  yield
  sys.modules.pop("own_verifiers", None)


def test_a_function_of_the_current_folder(own):
  length = verifiers.load("own_verifiers:length")
  assert length.score("abc", "x", "row") == 0.75
  assert length.vote is None
  starts = verifiers.load("own_verifiers:starts")
  assert starts.score("abc", "a", "row") == 1


@pytest.mark.parametrize(
  ("name", "completion", "parts"),
  [
    ("length", "abcde", ["row 7", "[0, 1], got 1.25", "'abcde'"]),
    ("word", "", ["row 7", "True, False or a score", "'yes'"]),
    ("nothing", "", ["got nan"]),
    ("starts", "", ["row 7", "IndexError", "line 5", "the empty one"]),
    ("single", "", ["TypeError", "2 were given"]),
    ("leaves", "", ["row 7", "raised SystemExit: no x"]),
  ],
)
def test_what_a_function_does_wrong(own, name, completion, parts):
  verifier = verifiers.load(f"own_verifiers:{name}")
  with pytest.raises(InputError) as raised:
    verifier.score(completion, "x", "row 7")
  assert all(part in str(raised.value) for part in parts), raised.value


@pytest.mark.parametrize("name", ["listed", "paired"])
def test_a_vote_must_be_hashable(own, name):
  with pytest.raises(InputError, match=r"row 7: `vote`.*hashable.*\['a'\]"):
    verifiers.load(f"own_verifiers:{name}").vote_of("a", "row 7")


@pytest.mark.parametrize(
  ("name", "parts"),
  [
    ("numbr", ["'numbr'", "known: exact, number", "module:function"]),
    ("own_verifiers", ["unknown verifier", "module:function"]),
    (":f", ["unknown verifier"]),
    (
      "no_such_module:f",
      ["'no_such_module' cannot be imported", "without .py"],
    ),
    ("leaving_verifier:f", ["cannot be imported (SystemExit: 3)"]),
    ("broken_verifier:f", ["ModuleNotFoundError", "nowhere_to_be_found"]),
    ("own_verifiers:lenght", ["no function 'lenght'", "length, listed"]),
    ("own_verifiers:LIMIT", ["no function 'LIMIT'"]),
  ],
)
def test_what_cannot_be_loaded(own, name, parts):
  with pytest.raises(InputError) as raised:
    verifiers.load(name)
  assert all(part in str(raised.value) for part in parts), raised.value


def test_verifiers_need_no_jax():
  script = "import opd_jax.verifiers, sys; print('jax' in sys.modules)"
  command = [sys.executable, "-c", script]
  result = subprocess.run(command, capture_output=True, text=True, check=True)
  assert result.stdout == "False\n"


def test_scores_are_plain_floats():
  verifier = verifiers.Verifier(
    name="half", function=lambda *_: np.float32(0.5), vote=None
  )
  score = verifier.score("", "", "row")
  assert type(score) is float
  assert math.isclose(score, 0.5)
