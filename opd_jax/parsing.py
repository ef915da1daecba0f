"""From a config file or nested mappings to config dataclasses, all checked.

A file is a Python program that defines `get_config(arg)` and returns a
ConfigDict or a dict; overrides come from the command line.
"""

import ast
import dataclasses
import difflib
import inspect
import re
import runpy
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from opd_jax.config import require
from opd_jax.errors import InputError

ConfigT = TypeVar("ConfigT")

# Of the keys without a default, as they are written in a config: by the whole
# name of a key, or else its last part.
_EXAMPLES = {
  "student": '{"path": "Qwen/Qwen3-0.6B"}',
  "teacher": '{"path": "Qwen/Qwen3-8B"}',
  "data": '{"sources": {"mine": {"path": "rows.jsonl"}}}',
  "sources": '{"mine": {"path": "rows.jsonl"}}',
  "path": '"rows.jsonl"',
  "student.path": '"Qwen/Qwen3-0.6B"',
  "teacher.path": '"Qwen/Qwen3-8B"',
  "objective": '{"name": "gkd"}',
  "steps": "100",
}


def load(
  cls: type[ConfigT], location: str, overrides: Sequence[str] = ()
) -> ConfigT:
  """Reads an experiment: a Python file that defines `get_config`.

  Args:
    cls: what the command wants: `RunConfig` or `SftConfig`.
    location: see `read`.
    overrides: "dotted.key=value" each, set after the file has been read. A
      value is a Python literal, or else a string.

  Raises:
    InputError: what `read` or `parse` complain about.
  """
  values = read(location)
  for override in overrides:
    _override(values, override)
  return parse(cls, values)


def read(location: str) -> dict[str, Any]:
  """The nested dicts that a Python file defines by `get_config`, unchecked.

  Args:
    location: "FILE.py", or "FILE.py:ARG" for `get_config(ARG)`.

  Raises:
    InputError: no such file, a file that gives no config, or no config for
      this argument.
  """
  path, _, argument = location.partition(":")
  if not Path(path).is_file():
    raise InputError(
      f"no config file {path!r}; give a Python file that defines get_config, "
      "such as configs/quickstart.py"
    )
  # A config file is the user's own program: what it raises is shown whole.
  names = runpy.run_path(path)
  get_config = names.get("get_config")
  if not callable(get_config):
    raise InputError(
      f"{path} defines no function get_config; write one that returns the "
      "experiment as a ConfigDict, as in configs/quickstart.py"
    )
  if argument:
    _check_argument(path, argument, get_config, names.get("TOPOLOGIES"))
  values = get_config(argument) if argument else get_config()
  if not hasattr(values, "items"):
    raise InputError(
      f"get_config of {path} must return a ConfigDict or a dict, got "
      f"{type(values).__name__}"
    )
  return _plain(values)


def _check_argument(
  path: str, argument: str, get_config: Callable[..., Any], known: Any
) -> None:
  """Raises where a config cannot be asked for `argument`.

  Args:
    path: of the file.
    argument: what follows its name.
    get_config: the function that it defines.
    known: its `TOPOLOGIES`, by argument; None if it has none.
  """
  require(
    bool(inspect.signature(get_config).parameters),
    f"{path}:{argument}: get_config of this file takes no argument; write "
    f"{path} alone",
  )
  if isinstance(known, Mapping) and argument not in known:
    raise InputError(
      f"{path}:{argument}: the file is not for {argument!r}; write {path}:NAME "
      f"with one of {', '.join(known)}"
    )


def _plain(values: Any) -> Any:
  """Nested dicts of a ConfigDict."""
  if not hasattr(values, "items"):
    return values
  return {key: _plain(value) for key, value in values.items()}


def _override(values: dict[str, Any], override: str) -> None:
  name, found, text = override.partition("=")
  require(
    bool(found), f"--config.{name} has no value; write --config.{name}=VALUE"
  )
  try:
    value = ast.literal_eval(text)
  except (SyntaxError, ValueError):
    value = text
  *groups, key = name.split(".")
  for group in groups:
    values = values.setdefault(group, {})
    require(
      isinstance(values, dict),
      f"--config.{name}: {group} is not a group of keys but {values!r}; see "
      "docs/configuration.md for the keys there are",
    )
  values[key] = value


def parse(cls: type, values: Mapping[str, Any], prefix: str = "") -> Any:
  """Builds a config dataclass from nested mappings, checking every key.

  Args:
    cls: a config dataclass; fields may be dataclasses themselves.
    values: a ConfigDict or dict.
    prefix: dotted name of `values` in the whole config, for messages.

  Raises:
    InputError: unknown key (with the nearest known one), missing key, wrong
      type, value out of range.
  """
  fields = {field.name: field for field in dataclasses.fields(cls)}
  hints = typing.get_type_hints(cls)
  for key in values:
    if key not in fields:
      near = difflib.get_close_matches(key, fields, n=1)
      hint = f"did you mean {prefix}{near[0]}? " if near else ""
      raise InputError(
        f"unknown config key {prefix}{key}; {hint}known keys: "
        f"{', '.join(sorted(fields))}"
      )
  arguments = {}
  for name, field in fields.items():
    if name in values:
      arguments[name] = _convert(hints[name], values[name], prefix + name)
    elif (
      field.default is dataclasses.MISSING
      and field.default_factory is dataclasses.MISSING
    ):
      key = f"{prefix}{name}"
      example = _EXAMPLES.get(key) or _EXAMPLES.get(name, "...")
      raise InputError(
        f"config key {key} is missing: {_meaning(cls, name)}; write "
        f'"{name}": {example}'
      )
  try:
    return cls(**arguments)
  except InputError:
    raise
  except ValueError as error:
    raise InputError(f"{prefix.rstrip('.')}: {error}") from error


def _meaning(cls: type, name: str) -> str:
  """What the docstring of a config class says of one of its keys."""
  pattern = re.compile(rf"^  {name}: (.*(?:\n {{4,}}.*)*)", re.MULTILINE)
  for base in cls.__mro__:
    entry = pattern.search(inspect.cleandoc(base.__doc__ or ""))
    if entry:
      return " ".join(entry[1].split()).removesuffix(".")
  return "it has no default"


def _convert(hint: Any, value: Any, name: str) -> Any:
  """Checks a value against a field's type; int becomes float where asked."""
  group = _group(hint)
  if group is not None and not (value is None and _matches(hint, None)):
    if isinstance(value, group):
      return value
    require(
      isinstance(value, Mapping) or hasattr(value, "items"),
      f"{name} must be a group of keys, got {value!r}",
    )
    return parse(group, dict(value.items()), f"{name}.")
  if typing.get_origin(hint) is Mapping and hasattr(value, "items"):
    _, item = typing.get_args(hint)
    if _group(item) is None:
      return dict(value.items())
    return {
      key: _convert(item, part, f"{name}.{key}") for key, part in value.items()
    }
  if _matches(hint, value):
    if isinstance(value, list):
      return tuple(value)
    return value
  if _matches(hint, 0.0) and type(value) is int:
    return float(value)
  raise InputError(
    f"{name} must be {_describe(hint)}, got {value!r} ({type(value).__name__})"
  )


def _group(hint: Any) -> type | None:
  """The config dataclass that a hint asks for, be it optional."""
  for option in (hint, *typing.get_args(hint)):
    if isinstance(option, type) and dataclasses.is_dataclass(option):
      return option if typing.get_origin(hint) is not Mapping else None
  return None


def _matches(hint: Any, value: Any) -> bool:
  origin = typing.get_origin(hint)
  if origin is Literal:
    return value in typing.get_args(hint)
  if origin in (types.UnionType, typing.Union):
    return any(_matches(option, value) for option in typing.get_args(hint))
  if origin is tuple:
    (item, _) = typing.get_args(hint)
    return isinstance(value, tuple | list) and all(
      _matches(item, element) for element in value
    )
  if origin is Mapping:
    return isinstance(value, Mapping) or hasattr(value, "items")
  if hint is type(None):
    return value is None
  if hint in (int, float):
    return type(value) is hint
  return isinstance(value, hint)


def _describe(hint: Any) -> str:
  origin = typing.get_origin(hint)
  if origin is Literal:
    return "one of " + ", ".join(repr(item) for item in typing.get_args(hint))
  if origin in (types.UnionType, typing.Union):
    return " or ".join(_describe(option) for option in typing.get_args(hint))
  if hint is type(None):
    return "None"
  return getattr(hint, "__name__", str(hint)) if origin is None else str(hint)
