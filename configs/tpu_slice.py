r"""Qwen3-8B teaches Qwen3-1.7B on one v5e-16 slice: fsdp 4 x tensor 4, 4 hosts.

On every host: the checkout, both models in the Hugging Face cache, and the
prompts, one {"text": ...} a line, already in the form the models expect.

  launch/tpu_vm.sh --tpu=NAME --zone=ZONE --setup -- \
    --config=configs/tpu_slice.py:PROMPTS.jsonl --workdir=DIR

Not run on TPUs yet. Compiled ahead of time for v5e:4x4 with libtpu 0.0.51, in
147 s on two CPU cores: each chip of 16 GiB holds 2.16 GiB of arguments (the
student's weights and moments in float32, the teacher in bfloat16) and 4.47 GiB
of temporaries, by the compiler's account.
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
