r"""Qwen3-30B-A3B, a mixture of experts, teaches Qwen3-4B on v5p 2x4x4.

64 prompts of 1,024 tokens x 2 answers of 4,096. The teacher's 128 experts lie
on 8 groups of devices, which share the batch as well.

  opd-jax plan --config=configs/pods/qwen3_4b_from_30b_a3b.py
  launch/tpu_vm.sh --tpu=NAME --zone=ZONE --setup -- \
    --config=configs/pods/qwen3_4b_from_30b_a3b.py --workdir=DIR \
    --config.data.sources.prompts.path=PROMPTS.jsonl

PROMPTS.jsonl has one {"text": ...} a line, which becomes the user's message.
Not run on TPUs yet; docs/plan.md has the fit by the TPU compiler.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """The experiment."""
  return ConfigDict(
    {
      "student": {
        "path": "Qwen/Qwen3-4B",
        "compute_dtype": "bfloat16",
        "remat": "full",
      },
      "teacher": {"path": "Qwen/Qwen3-30B-A3B", "compute_dtype": "bfloat16"},
      "data": {
        "sources": {
          "prompts": {"path": "prompts.jsonl", "prompt": {"chat": True}}
        },
        "max_prompt_tokens": 1024,
        "overlong": "drop",
      },
      "sampling": {"max_new_tokens": 4096},
      "batch": {
        "prompts": 64,
        "rollouts": 2,
        "micro_batches": 4,
        "chunk_tokens": 1024,
      },
      "objective": {"name": "opd_k1"},
      "optimizer": {
        "learning_rate": 3e-6,
        "warmup_steps": 20,
        "schedule": "cosine",
        "final_fraction": 0.1,
      },
      "topology": "v5p:2x4x4",
      "mesh": {"fsdp": 4, "expert": 8},
      "checkpoint": {"every": 50},
      "steps": 500,
    }
  )
