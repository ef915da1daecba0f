"""The quickstart: a sloppy student of sums and a careful teacher, on a CPU.

Full-vocabulary reverse KL on the student's own solutions of the task `arith`.

  opd-jax train --config=configs/quickstart.py --workdir=runs/quickstart

`make quickstart` runs it. Student and teacher are in `checkpoints/`, trained by
`arith_student.py` and `arith_teacher.py` beside this file.
"""

import os
import pathlib

from ml_collections import ConfigDict

HERE = pathlib.Path(__file__).resolve().parent
CHECKPOINTS = os.path.relpath(HERE.parent / "checkpoints")


def get_config() -> ConfigDict:
  """The experiment."""
  return ConfigDict(
    {
      "student": {"path": f"{CHECKPOINTS}/arith_student"},
      "teacher": {"path": f"{CHECKPOINTS}/arith_teacher"},
      "data": {
        "sources": {
          "arith": {"path": "arith", "prompt": {"text": "{question}"}}
        },
        "max_prompt_tokens": 14,
      },
      "sampling": {"max_new_tokens": 48},
      "batch": {"prompts": 64, "chunk_tokens": 1024},
      "objective": {"name": "gkd", "beta": 1.0},
      "optimizer": {
        "learning_rate": 2e-3,
        "warmup_steps": 5,
        "schedule": "cosine",
        "final_fraction": 0.1,
      },
      "eval": {
        "source": {
          "path": "arith",
          "split": "test",
          "options": {"rows": 250},
          "prompt": {"text": "{question}"},
        },
        "samples": 8,
        "batch": 250,
        "every": 25,
        "teacher": True,
      },
      "log": {"every": 5, "sample_every": 25, "time_split_every": None},
      "steps": 100,
    }
  )
