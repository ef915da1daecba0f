r"""Qwen3-32B teaches Qwen3-8B: 64 to 256 chips, one slice or two.

64 prompts of 1,024 tokens, answers of 4,096, plain on-policy distillation. Two
slices are two replicas: only gradients cross between them.

  opd-jax plan --config=configs/pods/qwen3_8b_from_32b.py:v6e-64
  launch/tpu_vm.sh --tpu=NAME --zone=ZONE --setup -- \
    --config=configs/pods/qwen3_8b_from_32b.py --workdir=DIR \
    --config.data.sources.prompts.path=PROMPTS.jsonl

PROMPTS.jsonl has one {"text": ...} a line, which becomes the user's message.
Not run on TPUs yet; docs/plan.md has the fit by the TPU compiler.
"""

from ml_collections import ConfigDict

# Completions per prompt, and the mesh, by slice.
TOPOLOGIES = {
  "v5p:4x4x4": (1, {"fsdp": 16, "tensor": 4}),
  "v6e-64": (1, {"fsdp": 8, "tensor": 8}),
  "v5e-256": (4, {"fsdp": 32, "tensor": 8}),
  "2*v6e-64": (2, {"replica": 2, "fsdp": 8, "tensor": 8}),
}


def get_config(topology: str = "v5p:4x4x4") -> ConfigDict:
  """The experiment on one of `TOPOLOGIES`."""
  rollouts, mesh = TOPOLOGIES[topology]
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
          "prompts": {"path": "prompts.jsonl", "prompt": {"chat": True}}
        },
        "max_prompt_tokens": 1024,
        "overlong": "drop",
      },
      "sampling": {"max_new_tokens": 4096},
      "batch": {
        "prompts": 64,
        "rollouts": rollouts,
        "micro_batches": 2 * rollouts,
        "chunk_tokens": 1024,
      },
      "objective": {"name": "opd_k1"},
      "optimizer": {
        "learning_rate": 2e-6,
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
