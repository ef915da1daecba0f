"""The control of the quickstart: the student learns the teacher's solutions.

As many problems, updates and (about) as many tokens as in `quickstart.py`, with
the same optimizer, but the solutions were drawn by the teacher instead of the
student:

  opd-jax generate --model=checkpoints/arith_teacher --data=arith \\
    --rows=6400 --prompt="{question}" --max_new_tokens=48 \\
    --out=runs/teacher_samples.jsonl
  opd-jax sft --config=configs/arith_sft.py --workdir=runs/arith_sft
"""

import os
import pathlib

from ml_collections import ConfigDict

HERE = pathlib.Path(__file__).resolve().parent
CHECKPOINTS = os.path.relpath(HERE.parent / "checkpoints")


def get_config(samples: str = "runs/teacher_samples.jsonl") -> ConfigDict:
  """The experiment, on completions that `opd-jax generate` wrote."""
  return ConfigDict(
    {
      "student": {"path": f"{CHECKPOINTS}/arith_student"},
      "data": {
        "sources": {
          "teacher": {"path": samples, "prompt": {"text": "{question}"}}
        },
      },
      # 64 examples of 44 tokens a step, as the quickstart has 64 prompts.
      "batch": {"rows": 24, "row_tokens": 128, "chunk_tokens": 1024},
      "optimizer": {
        "learning_rate": 1e-3,
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
        "sampling": {"max_new_tokens": 48},
        "batch": 250,
        "every": 25,
      },
      "log": {"every": 5},
      "steps": 100,
    }
  )
