r"""Qwen3-8B teaches Qwen3-1.7B on one v5e-16 slice: fsdp 4 x tensor 4, 4 hosts.

On every host: the checkout, both models in the Hugging Face cache, and the
prompts, one {"text": ...} a line, already in the form the models expect.

  launch/tpu_vm.sh --tpu=NAME --zone=ZONE --setup -- --distributed \
    --config=configs/tpu_slice.py:PROMPTS.jsonl --workdir=DIR

Not run on TPUs yet; the shapes are checked by tests/configs_test.py. By count,
each chip of 16 GiB then keeps 1.2 GiB of student weights and moments (float32,
over 16), 0.95 GiB of teacher (bfloat16, over 16), 0.8 GiB of decode copy
(bfloat16, over tensor) and, while it samples, 1.3 GiB of keys and values.
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
        "path": prompts,
        "max_prompt_tokens": 512,
        "overlong": "drop",
      },
      "sampling": {"max_new_tokens": 1024},
      "batch": {
        "prompts": 32,
        "rollouts": 4,
        "micro_batches": 8,
      },
      "objective": {"name": "gkd", "beta": 1.0},
      "optimizer": {
        "learning_rate": 5e-6,
        "warmup_steps": 20,
        "schedule": "cosine",
        "final_fraction": 0.1,
      },
      "mesh": {"fsdp": 4, "tensor": 4},
      "checkpoint": {"every": 50},
      "steps": 500,
    }
  )
