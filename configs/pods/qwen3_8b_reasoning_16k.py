r"""Qwen3-32B teaches Qwen3-8B to reason: answers of 16,384 tokens on v5p 4x4x4.

64 prompts of 1,024 tokens. The slots of each row lie on 4 devices (`context`),
the cache with them.

  opd-jax plan --config=configs/pods/qwen3_8b_reasoning_16k.py
  launch/tpu_vm.sh --tpu=NAME --zone=ZONE --setup -- \
    --config=configs/pods/qwen3_8b_reasoning_16k.py --workdir=DIR \
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
        "path": "Qwen/Qwen3-8B",
        "compute_dtype": "bfloat16",
        "remat": "full",
      },
      "teacher": {"path": "Qwen/Qwen3-32B", "compute_dtype": "bfloat16"},
      "data": {
        "sources": {
          "prompts": {
            "path": "prompts.jsonl",
            "prompt": {"chat": True, "thinking": True},
          }
        },
        "max_prompt_tokens": 1024,
        "overlong": "drop",
      },
      "sampling": {"max_new_tokens": 16384},
      "batch": {"prompts": 64, "micro_batches": 4, "chunk_tokens": 1024},
      "objective": {"name": "opd_k1"},
      "optimizer": {
        "learning_rate": 2e-6,
        "warmup_steps": 20,
        "schedule": "cosine",
        "final_fraction": 0.1,
      },
      "topology": "v5p:4x4x4",
      "mesh": {"fsdp": 4, "tensor": 4, "context": 4},
      "checkpoint": {"every": 25},
      "steps": 300,
    }
  )
