r"""The sharding of a pod on eight virtual CPU devices: fsdp 4 x tensor 2.

The pair and the data are those of tinystories_babyllama.py.

  launch/cpu8.sh --config=configs/cpu8.py --workdir=runs/cpu8
  launch/cpu8.sh --config=configs/cpu8.py:DATA_DIR --workdir=runs/cpu8

Expect the losses of one device, which is

  DEVICES=1 launch/cpu8.sh --config=configs/cpu8.py --workdir=runs/cpu1 \
    --config.mesh.fsdp=1 --config.mesh.tensor=1

Seen on two cores: six equal digits up to step 12, then a draw on the edge of
two tokens fell to the other side, and the runs went apart. Held-out loss 1.899
before, 1.885 after (1.907 on one device); 38 s, 16 s of them compiling.
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
      "sampling": {"max_new_tokens": 48},
      "batch": {"prompts": 8, "rollouts": 2, "micro_batches": 2},
      "objective": {"name": "gkd", "beta": 1.0},
      "optimizer": {"learning_rate": 5e-4, "warmup_steps": 5},
      "mesh": {"fsdp": 4, "tensor": 2},
      "held_out": {
        "path": f"{data_dir}/tinystories/valid.jsonl",
        "rows": 40,
        "max_characters": 240,
        "replace_newlines": " ",
        "every": 10,
      },
      "log": {"every": 1, "time_split_every": None},
      "steps": 20,
    }
  )
