"""The quickstart with adapters: the student's own weights stay as they are.

  opd-jax train --config=configs/quickstart_lora.py --workdir=runs/lora
  opd-jax export --workdir=runs/lora --out=runs/adapter --format=adapter

The run exports the student with its adapters merged; the second line writes
what was trained of it, for PEFT. `docs/lora.md` says more.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

HERE = pathlib.Path(__file__).resolve().parent


def get_config() -> ConfigDict:
  """The experiment."""
  config = runpy.run_path(str(HERE / "quickstart.py"))["get_config"]()
  config.student.lora = {"rank": 8, "alpha": 16.0}
  config.optimizer.learning_rate = 1e-2
  return config
