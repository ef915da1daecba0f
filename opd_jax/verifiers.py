r"""Is a completion right? Functions of its text and of the answer.

A verifier takes (completion, answer) and says True or False, or a score in
[0, 1]. Beside the built-in ones, "module:function" names one of the user's own.
A function may carry an attribute `vote`: a function of the completion that
gives its answer as something hashable, or None where it gives none. The
majority of several completions is taken over these.

`number` compares the last number of both texts, exactly. A number may have a
sign, a currency sign, thousands separators, decimals, an exponent (2.5e-3), a
denominator (3/4, \frac{3}{4}) and a whole part before it (1 3/4). What stands
around it is ignored, a percent sign and units included: 50% is 50, not 1/2.
After "####" the first number counts, in "\boxed{...}" the last, whatever
numbers follow; of several marks the last counts.
"""

import dataclasses
import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Hashable
from fractions import Fraction
from typing import Any

import numpy as np

from opd_jax.errors import InputError

# Python's own limit for converting digits is 4300; no answer has 400.
_MAX_DIGITS = 400
_SCORES = bool | int | float | np.bool_ | np.integer | np.floating
_UNSIGNED = (
  r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
)
_NUMBER = re.compile(
  # Not inside a word or a longer number: "x2", "1.2.3". So a minus between two
  # numbers is no sign: "10-3".
  r"(?<![A-Za-z0-9_.])"
  # A sign, unless it subtracts: "f(2)-3". Currency on either side of it.
  r"(?P<sign>(?<![)\]}])[-+])?(?:\\?[$€£])?(?P<inner>(?<=[$€£])[-+])?"
  rf"(?:(?P<whole>[0-9]+) +(?=[0-9]+/[0-9]))?"
  rf"(?P<top>{_UNSIGNED})"
  r"(?:[eE](?P<exponent>[-+]?[0-9]{1,3})(?![0-9A-Za-z]))?"
  rf"(?: ?/ ?(?P<bottom>{_UNSIGNED})(?! ?/ ?[0-9]))?"
)
_FRACTION = re.compile(
  r"\\[dt]?frac\s*(?:\{\s*([0-9.,]+)\s*\}|([0-9]))\s*"
  r"(?:\{\s*([0-9.,]+)\s*\}|([0-9]))"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verifier:
  """A verifier whose results are checked.

  Attributes:
    name: as it is in a config.
    function: of (completion, answer).
    vote: the answer a completion gives, None where it gives none; None if the
      verifier cannot tell.
  """

  name: str
  function: Callable[[str, str], Any]
  vote: Callable[[str], Hashable] | None

  def score(self, completion: str, answer: str, where: str) -> float:
    """The score of a completion, in [0, 1]; 1 is right.

    Args:
      completion: the text a model wrote.
      answer: what is right, as the source gives it.
      where: the row, for messages.

    Raises:
      InputError: the function raised, or gave something else than a score.
    """
    score = self._call(self.function, (completion, answer), where)
    # A comparison with NaN is false.
    if not isinstance(score, _SCORES) or not 0 <= float(score) <= 1:
      raise InputError(
        f"{where}: verifier {self.name!r} must give True, False or a score in "
        f"[0, 1], got {score!r:.80} for the completion {completion!r:.80} and "
        f"the answer {answer!r:.80}"
      )
    return float(score)

  def vote_of(self, completion: str, where: str) -> Hashable:
    """The answer a completion gives, or None; only where there is `vote`.

    Raises:
      InputError: the function raised, or gave something that has no hash.
    """
    vote = self._call(self.vote, (completion,), where)
    try:
      # A tuple is of a hashable kind, whatever it holds.
      hash(vote)
    except TypeError as error:
      raise InputError(
        f"{where}: `vote` of verifier {self.name!r} must give something "
        f"hashable, such as a text, got {vote!r:.80} ({error})"
      ) from error
    return vote

  def _call(self, function: Any, arguments: tuple[str, ...], where: str) -> Any:
    try:
      return function(*arguments)
    except InputError as error:
      raise InputError(f"{where}: {error}") from error
    except (Exception, SystemExit) as error:
      frame = traceback.extract_tb(error.__traceback__)[-1]
      shown = " and the answer ".join(f"{text!r:.80}" for text in arguments)
      raise InputError(
        f"{where}: verifier {self.name!r} raised {type(error).__name__}: "
        f"{error} ({frame.filename}, line {frame.lineno}) for the completion "
        f"{shown}; mend it: it must bear every text, the empty one included"
      ) from error


def exact(completion: str, answer: str) -> bool:
  """Whether the texts are equal but for white space around them."""
  return completion.strip() == answer.strip()


def number(completion: str, answer: str) -> bool:
  """Whether the last numbers of the texts are equal; see the module.

  Raises:
    InputError: the answer has no number.
  """
  wanted = last_number(answer)
  if wanted is None:
    raise InputError(
      f'verifier "number": the answer {answer!r:.80} has no number; name '
      'another field in the answer template of the source, or use "exact"'
    )
  return last_number(completion) == wanted


def last_number(text: str) -> Fraction | None:
  """The number that a text ends with or marks; see the module."""
  text = text.replace("−", "-").replace("{,}", ",").replace(r"\%", "%")
  text = re.sub(r"\\[,!]", "", text)
  text = _FRACTION.sub(_plain_fraction, text)
  text = re.sub(r"(\\[A-Za-z]+)(?=[0-9])", r"\1 ", text)
  hashes, box = text.rfind("####"), text.rfind(r"\boxed{")
  if hashes > box:
    line = text[hashes:].lstrip("#").strip().partition("\n")[0]
    return _value(_NUMBER.search(line))
  if box >= 0:
    text = _braced(text[box + len(r"\boxed{") :])
  matches = list(_NUMBER.finditer(text))
  return _value(matches[-1]) if matches else None


def _plain_fraction(match: re.Match[str]) -> str:
  top, bottom = match[1] or match[2], match[3] or match[4]
  space = " " if match.string[: match.start()][-1:].isdigit() else ""
  return f"{space}{top}/{bottom}"


def _braced(text: str) -> str:
  """A text up to the brace that closes one opened before it."""
  depth = 1
  for index, character in enumerate(text):
    depth += {"{": 1, "}": -1}.get(character, 0)
    if depth == 0:
      return text[:index]
  return text


def _value(match: re.Match[str] | None) -> Fraction | None:
  if match is None or len(match[0]) > _MAX_DIGITS:
    return None
  top = Fraction(match["top"].replace(",", ""))
  if match["exponent"]:
    top *= Fraction(10) ** int(match["exponent"])
  if match["bottom"]:
    bottom = Fraction(match["bottom"].replace(",", ""))
    if bottom == 0:
      return None
    top /= bottom
  top += int(match["whole"] or 0)
  negative = (match["sign"] == "-") != (match["inner"] == "-")
  return -top if negative else top


def _own_text(completion: str) -> str | None:
  return completion.strip() or None


VERIFIERS: dict[str, Verifier] = {
  "exact": Verifier(name="exact", function=exact, vote=_own_text),
  "number": Verifier(name="number", function=number, vote=last_number),
}


def load(name: str) -> Verifier:
  """The verifier of this name.

  Args:
    name: one of `VERIFIERS`, or "module:function". The module is looked for in
      the current folder too.

  Raises:
    InputError: no such verifier, or one that cannot be imported.
  """
  if name in VERIFIERS:
    return VERIFIERS[name]
  module_name, colon, function_name = name.partition(":")
  if not (module_name and colon and function_name):
    raise InputError(
      f"unknown verifier {name!r}; known: {', '.join(VERIFIERS)}; or name a "
      'function of your own as "module:function"'
    )
  here = os.getcwd()
  if here not in sys.path:
    sys.path.insert(0, here)
  try:
    module = importlib.import_module(module_name)
  except (Exception, SystemExit) as error:
    raise InputError(
      f"verifier {name!r}: module {module_name!r} cannot be imported "
      f"({type(error).__name__}: {error}); it is looked for in {here} and on "
      "PYTHONPATH; write its dotted name, without .py"
    ) from error
  function = getattr(module, function_name, None)
  if not callable(function):
    there = sorted(
      key
      for key, value in vars(module).items()
      if callable(value) and not key.startswith("_")
    )
    raise InputError(
      f"verifier {name!r}: {module_name} has no function {function_name!r}; "
      f"it has {', '.join(there) or 'none'}"
    )
  return Verifier(
    name=name, function=function, vote=getattr(function, "vote", None)
  )
