r"""Gemma-2-9b teaches Gemma-2-2b on v5e-16.

64 prompts of 512 tokens x 2 answers of 1,024, whole distributions compared over
the 256,000 ids of the family.

  opd-jax plan --config=configs/pods/gemma2_2b_from_9b.py
  launch/tpu_vm.sh --tpu=NAME --zone=ZONE --setup -- \
    --config=configs/pods/gemma2_2b_from_9b.py --workdir=DIR \
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
        "path": "google/gemma-2-2b-it",
        "compute_dtype": "bfloat16",
        "remat": "full",
      },
      "teacher": {"path": "google/gemma-2-9b-it", "compute_dtype": "bfloat16"},
      "data": {
        "sources": {
          "prompts": {"path": "prompts.jsonl", "prompt": {"chat": True}}
        },
        "max_prompt_tokens": 512,
        "overlong": "drop",
      },
      "sampling": {"max_new_tokens": 1024},
      "batch": {
        "prompts": 64,
        "rollouts": 2,
        "micro_batches": 8,
        "chunk_tokens": 512,
      },
      "objective": {"name": "gkd", "beta": 1.0},
      "optimizer": {
        "learning_rate": 5e-6,
        "warmup_steps": 20,
        "schedule": "cosine",
        "final_fraction": 0.1,
      },
      "topology": "v5e-16",
      "mesh": {"fsdp": 4, "tensor": 4},
      "checkpoint": {"every": 50},
      "steps": 500,
    }
  )
