"""Qwen3-8B teaches Qwen3-1.7B on one machine with 8 GPUs of 80 GB: fsdp 8.

Both models in the Hugging Face cache; the prompts one {"text": ...} a line,
already in the form the models expect.

  opd-jax train --config=configs/gpu_box.py:PROMPTS.jsonl --workdir=runs/box

Not run on such a machine yet; the shapes are checked by tests/configs_test.py.
By count, each GPU keeps 2.4 GiB of student weights and moments (float32, over
8), 1.9 GiB of teacher (bfloat16, over 8), 3.2 GiB of decode copy (bfloat16,
whole) and, while it samples, 5.3 GiB of keys and values.
"""

from ml_collections import ConfigDict


def get_config(prompts: str = "prompts.jsonl") -> ConfigDict:
  """The experiment, on the prompts of a JSONL file."""
  return ConfigDict(
    {
      "student": {
        "path": "Qwen/Qwen3-1.7B",
        "compute_dtype": "bfloat16",
        "remat": "full",
      },
      "teacher": {"path": "Qwen/Qwen3-8B", "compute_dtype": "bfloat16"},
      "data": {
        "sources": {"prompts": {"path": prompts}},
        "max_prompt_tokens": 512,
        "overlong": "drop",
      },
      "sampling": {"max_new_tokens": 1024},
      "batch": {
        "prompts": 64,
        "rollouts": 4,
        "micro_batches": 8,
        "chunk_tokens": 1024,
      },
      "objective": {"name": "opd_k1"},
      "optimizer": {
        "learning_rate": 5e-6,
        "warmup_steps": 20,
        "schedule": "cosine",
        "final_fraction": 0.1,
      },
      "mesh": {"fsdp": 8},
      "checkpoint": {"every": 50},
      "steps": 500,
    }
  )
