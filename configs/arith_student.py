"""The student of the quickstart: it learned from faulty solutions.

Supervised fine-tuning on solutions of the task `arith` in which one step of
five or six is wrong. Half of these solutions (51 %) end with the right answer,
and so do the student's once it has converged: it draws what it was shown.

  opd-jax sft --config=configs/arith_student.py --workdir=runs/arith_student

`runs/arith_student/export` then holds what is shipped as
`checkpoints/arith_student`, from which only config.json and the tokenizer are
taken here.
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
      "student": {"path": f"{CHECKPOINTS}/arith_student", "init": "random"},
      "data": {
        "sources": {
          "arith": {
            "path": "arith",
            "options": {"rows": 100_000, "slips": 0.2},
            "prompt": {"text": "{question}"},
            "completion": "{solution}",
          }
        },
      },
      "batch": {"rows": 16, "row_tokens": 128, "chunk_tokens": 2048},
      "optimizer": {
        "learning_rate": 4e-3,
        "warmup_steps": 50,
        "schedule": "cosine",
        "final_fraction": 0.02,
        "b2": 0.98,
        "weight_decay": 0.01,
      },
      "eval": {
        "source": {
          "path": "arith",
          "split": "test",
          "options": {"rows": 250},
          "prompt": {"text": "{question}"},
        },
        "samples": 8,
        "sampling": {"max_new_tokens": 48},
        "batch": 250,
        "every": 250,
      },
      "checkpoint": {"every": 500},
      "log": {"every": 50},
      "steps": 2000,
    }
  )
