r"""Qwen3-8B teaches Qwen3-1.7B on one small slice, v5e-16 or v6e-8.

64 prompts x 4 answers of 2,048 tokens a step, whole distributions compared.

  opd-jax plan --config=configs/pods/qwen3_1_7b_from_8b.py:v6e-8
  launch/tpu_vm.sh --tpu=NAME --zone=ZONE --setup -- \
    --config=configs/pods/qwen3_1_7b_from_8b.py --workdir=DIR \
    --config.data.sources.prompts.path=PROMPTS.jsonl

PROMPTS.jsonl has one {"text": ...} a line, which becomes the user's message.
Not run on TPUs yet; docs/plan.md has the fit by the TPU compiler.
"""

from ml_collections import ConfigDict

TOPOLOGIES = {
  "v5e-16": {"fsdp": 4, "tensor": 4},
  "v6e-8": {"fsdp": 4, "tensor": 2},
}


def get_config(topology: str = "v5e-16") -> ConfigDict:
  """The experiment on one of the slices of `TOPOLOGIES`."""
  return ConfigDict(
    {
      "student": {
        "path": "Qwen/Qwen3-1.7B",
        "compute_dtype": "bfloat16",
        "remat": "full",
      },
      "teacher": {"path": "Qwen/Qwen3-8B", "compute_dtype": "bfloat16"},
      "data": {
        "sources": {
          "prompts": {"path": "prompts.jsonl", "prompt": {"chat": True}}
        },
        "max_prompt_tokens": 512,
        "overlong": "drop",
      },
      "sampling": {"max_new_tokens": 2048},
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
      "topology": topology,
      "mesh": TOPOLOGIES[topology],
      "checkpoint": {"every": 50},
      "steps": 500,
    }
  )
