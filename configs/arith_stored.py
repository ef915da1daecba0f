"""The quickstart with stored solutions of the teacher: GKD, TrOPD, DistiLLM.

  opd-jax generate --model=checkpoints/arith_teacher --data=arith \\
    --rows=3200 --max_new_tokens=48 --batch=256 --out=runs/teacher.parquet
  opd-jax train --config=configs/arith_stored.py --workdir=runs/stored

By default half of the completions are the teacher's (lambda 0.5 of GKD);
`docs/stores.md` has the other ways to use them.
"""

import os
import pathlib

from ml_collections import ConfigDict

HERE = pathlib.Path(__file__).resolve().parent
CHECKPOINTS = os.path.relpath(HERE.parent / "checkpoints")


def get_config(method: str = "gkd") -> ConfigDict:
  """The experiment, by "gkd" or by the prefixes of "tropd"."""
  objective, rollout = {
    "gkd": ({"name": "gkd", "beta": 1.0}, {"stored_fraction": 0.5}),
    "tropd": (
      {"name": "tropd", "top_k": 8, "guidance": 0.001},
      {"prefix": "cosine"},
    ),
  }[method]
  return ConfigDict(
    {
      "student": {"path": f"{CHECKPOINTS}/arith_student"},
      "teacher": {"path": f"{CHECKPOINTS}/arith_teacher"},
      "data": {
        "sources": {
          "stored": {
            "path": "runs/teacher.parquet",
            "prompt": {"text": "{question}"},
            "given": True,
          }
        },
        "max_prompt_tokens": 14,
      },
      "sampling": {"max_new_tokens": 48},
      "rollout": rollout,
      "batch": {"prompts": 64, "chunk_tokens": 1024},
      "objective": objective,
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
        "every": 100,
      },
      "log": {"every": 5, "sample_every": 25, "time_split_every": None},
      "steps": 100,
    }
  )
