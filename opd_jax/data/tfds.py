"""TensorFlow Datasets: read without TensorFlow, and made of JSONL files.

Only datasets in the array_record format, which are read row by row without
TensorFlow. The import of tensorflow_datasets takes half a second, and waits
until a dataset is named.
"""

import contextlib
import difflib
import io
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from opd_jax.data.files import Row, plain, read_jsonl
from opd_jax.errors import InputError

VERSION = "1.0.0"
_FORMAT = "array_record"
_CATALOGUE_NAME = re.compile(r"[a-z]\w*(/[\w.+-]+)?(:[\d.]+)?", re.ASCII)
_OWN_NAME = re.compile(r"[a-z][a-z0-9_]*", re.ASCII)
# The description of a feature whose text is the field as JSON.
_JSON = "JSON"
_REMEDY = (
  "write the rows as JSONL or Parquet, or prepare it elsewhere with "
  f"`tfds build NAME --file_format={_FORMAT}` and name its folder in "
  "options.data_dir"
)


def read(name: str, split: str, options: Mapping[str, Any]) -> list[Row]:
  """The rows of a dataset, in the order of its files.

  A dataset that is prepared in `data_dir` is read from there. Any other is
  looked up in the catalogue of tensorflow_datasets, and downloaded into
  `data_dir`. Bytes become text; fields that `build` wrote as JSON become what
  they were.

  Args:
    name: NAME, NAME/CONFIG, either with :VERSION.
    split: "train", or a part such as "train[:100]".
    options: `data_dir`; without it that of tensorflow_datasets.

  Raises:
    InputError: an unknown option, name or split; a dataset of another format,
      or one that cannot be downloaded or read.
  """
  data_dir = _data_dir(options)
  if not _CATALOGUE_NAME.fullmatch(name):
    raise InputError(
      f"tfds:{name}: a dataset is named NAME, NAME/CONFIG or NAME:VERSION, "
      "such as tfds:math_qa"
    )
  builder = _prepared(name, data_dir) or _from_catalogue(name, data_dir)
  try:
    source = builder.as_data_source(split)
  except NotImplementedError as error:
    raise InputError(
      f"tfds:{name} in {builder.data_dir} is not in the format {_FORMAT}, "
      f"which is read without TensorFlow; {_REMEDY}"
    ) from error
  except ValueError as error:
    raise InputError(
      f"tfds:{name} has the splits {', '.join(builder.info.splits)}, got "
      f"{split!r}; name one of them, or a part such as train[:100]"
    ) from error
  encoded = _json_fields(builder.info.features)
  rows = [_decoded(plain(row), encoded) for row in source]
  if not rows:
    raise InputError(
      f"tfds:{name} has no rows in {split!r}; name a larger part"
    )
  return rows


def build(
  jsonl: str | Path, name: str, data_dir: str | Path, split: str = "train"
) -> Path:
  """Turns a JSONL file into a dataset, its rows in their order.

  Fields that are text, an integer or a boolean in every row become features of
  that type; all others (lists, floats, None, mixed types, fields that some rows
  lack) become their JSON as text, which `read` undoes. A dataset of this name
  gets the split beside those it has.

  Args:
    jsonl: the file.
    name: of the dataset: lower-case letters, digits and `_`.
    data_dir: folder of datasets.
    split: likewise named; must be new.

  Returns:
    The dataset's folder, `data_dir`/`name`/1.0.0.

  Raises:
    InputError: a bad file or name, a field that cannot be stored, or a split
      that is there.
  """
  for kind, value in (("name", name), ("split", split)):
    if not _OWN_NAME.fullmatch(value):
      raise InputError(
        f"{kind} of a dataset must be lower-case letters, digits and _, and "
        f"begin with a letter, got {value!r}; choose another"
      )
  splits = {}
  before = _prepared(name, str(data_dir))
  if before is not None:
    splits = {
      other: read(name, other, {"data_dir": str(data_dir)})
      for other in before.info.splits
    }
  if split in splits:
    raise InputError(
      f"dataset {name} in {data_dir} has the split {split!r}; choose another "
      "split or name, or remove its folder"
    )
  splits[split] = read_jsonl(jsonl)
  _check_text(splits[split], str(jsonl))
  folder = Path(data_dir) / name / VERSION
  folder.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=data_dir) as scratch:
    _write(name, splits, scratch)
    shutil.rmtree(folder, ignore_errors=True)
    (Path(scratch) / name / VERSION).rename(folder)
  return folder


def _data_dir(options: Mapping[str, Any]) -> str | None:
  unknown = sorted(set(options) - {"data_dir"})
  if unknown:
    raise InputError(
      f"unknown option {unknown[0]!r} of a TensorFlow Dataset; known: data_dir"
    )
  data_dir = options.get("data_dir")
  if data_dir is not None and not isinstance(data_dir, str):
    raise InputError(f"options.data_dir must be a folder, got {data_dir!r}")
  return data_dir


def _prepared(name: str, data_dir: str | None) -> Any:
  """The builder of a dataset on disk; None if there is none."""
  from tensorflow_datasets.core import read_only_builder, registered

  try:
    return read_only_builder.builder_from_files(name, data_dir=data_dir)
  except registered.DatasetNotFoundError:
    return None


def _from_catalogue(name: str, data_dir: str | None) -> Any:
  """The builder of a dataset of the catalogue, downloaded and prepared."""
  import tensorflow_datasets

  known = tensorflow_datasets.list_builders(with_community_datasets=False)
  plain_name = re.split("[/:]", name)[0]
  if plain_name not in known:
    close = difflib.get_close_matches(plain_name, known, 1)
    raise InputError(
      f"no TensorFlow Dataset {plain_name!r} in {data_dir or 'its folder'}, "
      f"nor among the {len(known)} of the catalogue of tensorflow_datasets "
      f"{tensorflow_datasets.__version__}"
      f"{f' (did you mean {close[0]!r}?)' if close else ''}; check the name "
      "and options.data_dir, or make one with `opd-jax dataset`"
    )
  try:
    with contextlib.redirect_stdout(sys.stderr):
      builder = tensorflow_datasets.builder(
        name, data_dir=data_dir, file_format=_FORMAT
      )
      builder.download_and_prepare()
  except (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
  ) as error:
    # Code of the catalogue: any of hundreds of datasets, most of them written
    # for TensorFlow.
    reason = str(error).strip().partition("\n")[0]
    raise InputError(
      f"cannot download and prepare tfds:{name} here "
      f"({type(error).__name__}: {reason}); {_REMEDY}"
    ) from error
  return builder


def _json_fields(features: Any) -> frozenset[str]:
  """The fields that `build` wrote as JSON."""
  return frozenset(
    field for field, feature in features.items() if feature.doc.desc == _JSON
  )


def _decoded(row: Row, encoded: frozenset[str]) -> Row:
  """A row with its JSON fields as they were; an empty text is a field less."""
  return {
    field: json.loads(value) if field in encoded else value
    for field, value in row.items()
    if field not in encoded or value
  }


def _check_text(rows: Sequence[Row], path: str) -> None:
  for number, row in enumerate(rows, start=1):
    try:
      json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
      raise InputError(
        f"{path}, line {number}: not valid text ({error.reason}); correct the "
        "row"
      ) from error


def _write(
  name: str, splits: Mapping[str, Sequence[Row]], data_dir: str
) -> None:
  """Writes a dataset with tensorflow_datasets."""
  import numpy as np
  import tensorflow_datasets
  from tensorflow_datasets import features

  rows = [row for split in splits.values() for row in split]
  fields = list(dict.fromkeys(field for row in rows for field in row))
  types = {field: _common_type(rows, field) for field in fields}
  made = {
    None: lambda: features.Text(doc=_JSON),
    str: features.Text,
    int: lambda: features.Scalar(np.int64),
    bool: lambda: features.Scalar(np.bool_),
  }

  def encoded(row: Row) -> Row:
    return {
      field: row[field]
      if kind is not None
      else json.dumps(row[field])
      if field in row
      else ""
      for field, kind in types.items()
    }

  class Builder(
    tensorflow_datasets.core.GeneratorBasedBuilder, skip_registration=True
  ):
    """The dataset; its name is set below."""

    def _info(self) -> Any:
      return tensorflow_datasets.core.DatasetInfo(
        builder=self,
        description="Rows of a JSONL file, in their order.",
        features=features.FeaturesDict(
          {field: made[kind]() for field, kind in types.items()}
        ),
        # Examples in the order of their keys.
        disable_shuffling=True,
      )

    def _split_generators(self, dl_manager: Any) -> Any:
      return {split: self._generate_examples(split) for split in splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, Row]]:
      yield from enumerate(map(encoded, splits[split]))

  Builder.name = name
  Builder.VERSION = tensorflow_datasets.core.Version(VERSION)
  tensorflow_datasets.disable_progress_bar()
  # It would speak of a download, and of the scratch folder.
  with contextlib.redirect_stdout(io.StringIO()):
    Builder(data_dir=data_dir, file_format=_FORMAT).download_and_prepare()


def _common_type(rows: Sequence[Row], field: str) -> type | None:
  """str, int or bool if every row has such a field; None otherwise."""
  if not all(field in row for row in rows):
    return None
  kinds = {type(row[field]) for row in rows}
  if kinds == {int} and not all(-(2**63) <= row[field] < 2**63 for row in rows):
    return None
  return kinds.pop() if kinds in ({str}, {int}, {bool}) else None
