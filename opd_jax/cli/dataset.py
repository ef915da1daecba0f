"""`opd-jax dataset`: a TensorFlow Dataset of a JSONL file."""

from collections.abc import Sequence
from typing import Any

from opd_jax.cli.flags import check_folder, new, parse


def run(arguments: Sequence[str]) -> int:
  """Runs the command; returns the exit status."""
  from absl import flags

  values = new()
  options: dict[str, Any] = {"flag_values": values}
  flags.DEFINE_string("jsonl", None, "rows: one object a line", **options)
  flags.DEFINE_string("name", None, "of the dataset, like my_data", **options)
  flags.DEFINE_string("data_dir", None, "folder of datasets", **options)
  flags.DEFINE_string("split", "train", "to write; must be new", **options)
  required = ("jsonl", "name", "data_dir")
  if not parse(values, "dataset", arguments, required=required):
    return 0
  check_folder("--data_dir", values.data_dir)
  from opd_jax.data import tfds

  folder = tfds.build(values.jsonl, values.name, values.data_dir, values.split)
  print(
    f"wrote {values.split} to {folder}; read it with "
    f'{{"path": "tfds:{values.name}", "split": "{values.split}", '
    f'"options": {{"data_dir": "{values.data_dir}"}}}}'
  )
  return 0
