"""A real pretrained pair: the 5-layer babyllama teaches its weak 4-layer twin.

Full-vocabulary reverse KL on the student's own continuations of TinyStories.

  opd-jax train --config=configs/tinystories_babyllama.py --workdir=runs/tiny
  opd-jax train --config=configs/tinystories_babyllama.py:DATA_DIR ...

DATA_DIR (default ../shared/data) holds `models/babyllama-teacher`,
`models/babyllama-student` and `tinystories/{train,valid}.jsonl`.

The student's last layer was cut off and never healed: its held-out loss starts
at 1.894 nats per token; the teacher's is 0.739.
"""

from ml_collections import ConfigDict


def get_config(data_dir: str = "../shared/data") -> ConfigDict:
  """The experiment, on models and texts in `data_dir`."""
  return ConfigDict(
    {
      "student": {"path": f"{data_dir}/models/babyllama-student"},
      "teacher": {"path": f"{data_dir}/models/babyllama-teacher"},
      "data": {
        "sources": {
          "stories": {
            "path": f"{data_dir}/tinystories/train.jsonl",
            "prompt": {"replace_newlines": " ", "first_tokens": 32},
          }
        },
        "max_prompt_tokens": 32,
      },
      "sampling": {"max_new_tokens": 96},
      "batch": {"prompts": 16},
      "objective": {"name": "gkd", "beta": 1.0},
      "optimizer": {
        "learning_rate": 2e-4,
        "warmup_steps": 10,
        "schedule": "cosine",
        "final_fraction": 0.1,
      },
      "held_out": {
        "path": f"{data_dir}/tinystories/valid.jsonl",
        "rows": 100,
        "max_characters": 240,
        "replace_newlines": " ",
      },
      "steps": 200,
    }
  )
