"""Completions on disk as ids, with the model that wrote them.

A store is a Parquet file of one row per completion: the fields of the source's
row and

  prompt          text; the source's own field of that name, if it has one
  prompt_ids      what the model read
  completion      text
  completion_ids  what it drew, the stop id included
  logprobs        nats per id, under the sampling distribution
  stopped         by a stop id, not by the length limit

Its schema's metadata hold an `Origin`. Ids are used as they are, never made
again from the text. To all other readers it is a Parquet file like any.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from opd_jax import storage
from opd_jax.data.files import Row
from opd_jax.errors import InputError

SUFFIX = ".parquet"
VERSION = 1

# Columns that are never those of the source.
OWN = ("prompt_ids", "completion", "completion_ids", "logprobs", "stopped")

_KEY = b"opd_jax.store"
_GROUP = 1024  # Rows that are in memory at the same time.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
  """Who wrote the completions of a store, and how.

  Attributes:
    model: path of the checkpoint.
    weights: `hf.fingerprint` of its weights.
    tokenizer: `Tokenizer.fingerprint`.
    sampling: the keys of `SamplingConfig`, the stop ids as they were used.
    seed: of the draws.
    samples: completions per row of the source.
    version: of this format.
  """

  model: str
  weights: str
  tokenizer: str
  sampling: dict[str, Any]
  seed: int
  samples: int
  version: int = VERSION


def write(
  path: str | Path,
  source: Sequence[Mapping[str, Any]],
  rows: Iterable[Row],
  origin: Origin,
) -> int:
  """Writes a store; the file appears when it is complete.

  Args:
    path: of the file.
    source: the rows that were completed, for the types of their fields.
    rows: those of the store, each with all fields; taken one after the other.
    origin: who wrote them.

  Returns:
    How many rows were written.

  Raises:
    InputError: fields of the source that Parquet has no type for.
  """
  import pyarrow as pa
  import pyarrow.parquet as pq

  integers = pa.list_(pa.int32())
  types = {
    "prompt": pa.string(),
    **_types(source),
    "prompt_ids": integers,
    "completion": pa.string(),
    "completion_ids": integers,
    "logprobs": pa.list_(pa.float32()),
    "stopped": pa.bool_(),
  }
  schema = pa.schema(types.items()).with_metadata(
    {_KEY: json.dumps(dataclasses.asdict(origin))}
  )
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = Path(f"{path}.partial")
  count = 0
  try:
    with pq.ParquetWriter(partial, schema) as writer:
      rows = iter(rows)
      while group := list(itertools.islice(rows, _GROUP)):
        writer.write_table(pa.Table.from_pylist(group, schema))
        count += len(group)
    partial.replace(path)
  except pa.ArrowException as error:
    raise InputError(
      f"cannot write {path} as Parquet: {error}; leave that field out of the "
      "data, or write JSONL"
    ) from error
  finally:
    partial.unlink(missing_ok=True)
  return count


def _types(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """The Arrow type of every field, from its values in all rows."""
  import pyarrow as pa

  found = {}
  for name in dict.fromkeys(name for row in rows for name in row):
    try:
      found[name] = pa.array([row.get(name) for row in rows]).type
    except (pa.ArrowException, OverflowError) as error:
      raise InputError(
        f"field {name!r} has no one type in all rows, which Parquet needs "
        f"({error}); make its values alike, leave it out of the data, or write "
        "JSONL"
      ) from error
  return found


def read_origin(path: str | Path) -> Origin:
  """Who wrote the completions of a store.

  Raises:
    InputError: no file, no store, or one of another version.
  """
  import pyarrow as pa
  import pyarrow.parquet as pq

  remedy = (
    "write one with opd-jax generate --model=TEACHER --data=ROWS "
    "--out=FILE.parquet"
  )
  file = storage.to_path(path)
  if file.suffix != SUFFIX or not file.is_file():
    raise InputError(f"{path} is no file of stored completions; {remedy}")
  try:
    with file.open("rb") as opened:
      metadata = pq.read_schema(opened).metadata or {}
  except (pa.ArrowException, OSError) as error:
    raise InputError(
      f"cannot read {path} as Parquet: {error}; {remedy}"
    ) from error
  if _KEY not in metadata:
    raise InputError(
      f"{path} holds no ids of a model's completions, it is a Parquet file "
      f"like any; {remedy}"
    )
  values = json.loads(metadata[_KEY])
  if values["version"] != VERSION:
    raise InputError(
      f"{path} is a store of version {values['version']}, and this program "
      f"reads version {VERSION}; {remedy}"
    )
  return Origin(**values)


def given_ids(
  row: Row,
  prompt: Sequence[int],
  stop_ids: Sequence[int],
  where: str,
) -> tuple[int, ...]:
  """The ids of a store's row, given for a prompt.

  Args:
    row: of a store.
    prompt: the ids that this run's template makes of the row.
    stop_ids: that end a completion of this run.
    where: the row, for messages.

  Raises:
    InputError: the completion belongs to another prompt, or goes on behind a
      stop id of this run.
  """
  if list(prompt) != row["prompt_ids"]:
    raise InputError(
      f"{where}: the completion was written behind {len(row['prompt_ids'])} "
      f"ids, {_shown(row['prompt_ids'])}, and this source's prompt makes "
      f"{len(prompt)}, {_shown(prompt)}; give the source the prompt template "
      "that the store was generated with"
    )
  ids = tuple(row["completion_ids"])
  early = [index for index in ids[:-1] if index in stop_ids]
  if early:
    raise InputError(
      f"{where}: the completion goes on behind id {early[0]}, which ends one "
      "in this run; set sampling.stop_ids to those of the store, or generate "
      "it again with these"
    )
  return ids


def _shown(ids: Sequence[int]) -> str:
  return f"[{', '.join(map(str, ids[:12]))}{', ...' if len(ids) > 12 else ''}]"
