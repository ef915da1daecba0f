r"""Llama-3.1-70B teaches Llama-3.1-8B on v5p 4x4x8.

128 prompts of 1,024 tokens, answers of 4,096; both models instruction-tuned.

  opd-jax plan --config=configs/pods/llama31_8b_from_70b.py
  launch/tpu_vm.sh --tpu=NAME --zone=ZONE --setup -- \
    --config=configs/pods/llama31_8b_from_70b.py --workdir=DIR \
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
        "path": "meta-llama/Llama-3.1-8B-Instruct",
        "compute_dtype": "bfloat16",
        "remat": "full",
      },
      "teacher": {
        "path": "meta-llama/Llama-3.1-70B-Instruct",
        "compute_dtype": "bfloat16",
      },
      "data": {
        "sources": {
          "prompts": {"path": "prompts.jsonl", "prompt": {"chat": True}}
        },
        "max_prompt_tokens": 1024,
        "overlong": "drop",
      },
      "sampling": {"max_new_tokens": 4096},
      "batch": {"prompts": 128, "micro_batches": 2, "chunk_tokens": 1024},
      "objective": {"name": "opd_k1"},
      "optimizer": {
        "learning_rate": 2e-6,
        "warmup_steps": 20,
        "schedule": "cosine",
        "final_fraction": 0.1,
      },
      "topology": "v5p:4x4x8",
      "mesh": {"fsdp": 32, "tensor": 4},
      "checkpoint": {"every": 50},
      "steps": 500,
    }
  )
