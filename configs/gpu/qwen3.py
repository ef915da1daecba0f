r"""Qwen3 on one machine of 1, 4 or 8 H100 or H200.

  opd-jax plan --config=configs/gpu/qwen3.py:h100:4
  opd-jax train --config=configs/gpu/qwen3.py:h100:4 --workdir=runs/box \
    --config.data.sources.prompts.path=PROMPTS.jsonl

| argument | teacher and student | prompts x answers | tokens |
|---|---|---|---|
| h100:1 | Qwen3-4B, Qwen3-0.6B | 32 x 2 | 512 + 1,024 |
| h100:4 | Qwen3-8B, Qwen3-1.7B | 64 x 2 | 512 + 2,048 |
| h100:8 | Qwen3-14B, Qwen3-4B | 64 x 1 | 1,024 + 4,096 |
| h200:8 | Qwen3-32B, Qwen3-8B | 64 x 1 | 1,024 + 4,096 |

PROMPTS.jsonl has one {"text": ...} a line, which becomes the user's message.
Not run on such machines yet; docs/plan.md has the memory as counted.
"""

from ml_collections import ConfigDict

# (Student, teacher), prompts, rollouts, prompt and completion tokens, mesh.
TOPOLOGIES = {
  "h100:1": (("0.6B", "4B"), 32, 2, 512, 1024, {"fsdp": 1}),
  "h100:4": (("1.7B", "8B"), 64, 2, 512, 2048, {"fsdp": 4}),
  "h100:8": (("4B", "14B"), 64, 1, 1024, 4096, {"fsdp": 8}),
  "h200:8": (("8B", "32B"), 64, 1, 1024, 4096, {"fsdp": 4, "tensor": 2}),
}


def get_config(topology: str = "h100:8") -> ConfigDict:
  """The experiment on one of `TOPOLOGIES`."""
  models, prompts, rollouts, window, length, mesh = TOPOLOGIES[topology]
  student, teacher = models
  return ConfigDict(
    {
      "student": {
        "path": f"Qwen/Qwen3-{student}",
        "compute_dtype": "bfloat16",
        "remat": "full",
      },
      "teacher": {
        "path": f"Qwen/Qwen3-{teacher}",
        "compute_dtype": "bfloat16",
      },
      "data": {
        "sources": {
          "prompts": {"path": "prompts.jsonl", "prompt": {"chat": True}}
        },
        "max_prompt_tokens": window,
        "overlong": "drop",
      },
      "sampling": {"max_new_tokens": length},
      "batch": {
        "prompts": prompts,
        "rollouts": rollouts,
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
      "topology": topology,
      "mesh": mesh,
      "checkpoint": {"every": 50},
      "steps": 500,
    }
  )
