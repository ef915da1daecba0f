"""A tiny pair of models and a step around them, for tests of the engine."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import objectives, optim
from opd_jax.config import (
  MeshConfig,
  OptimizerConfig,
  RolloutConfig,
  SamplingConfig,
)
from opd_jax.models import Model, ModelConfig
from opd_jax.scoring import Scorer
from opd_jax.sharding import layouts, make_mesh
from opd_jax.step import Step
from opd_jax.types import PromptBatch, StepInputs
from tests.objectives import toys

STUDENT = ModelConfig.from_hf(
  {
    "model_type": "qwen3",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
  }
)
# More ids than the student has, and an output layer of its own.
TEACHER = ModelConfig.from_hf(
  {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
  }
)
REFERENCE = ModelConfig.from_hf(
  {
    "model_type": "qwen3",
    "vocab_size": 62,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
  }
)
PROMPTS, ROLLOUTS, WINDOW, LENGTH = 4, 2, 6, 7
STOP_IDS = (3, 5, 11, 17, 23, 29)


def objective_of(name):
  if name in toys.TOYS:
    return toys.bind(name)
  options = {"gkd_jsd": {"name": "gkd", "beta": 0.3}}
  options["gkd_top_k"] = {"name": "gkd", "support": "union", "top_k": 8}
  options["opd_k1_discount"] = {"name": "opd_k1", "discount": 0.7}
  options["grpo_kl"] = {"name": "grpo", "kl": 0.5, "dual_clip": 3.0}
  options["aopd"] = {"name": "aopd", "top_k": 5}
  options["tropd"] = {"name": "tropd", "top_k": 5}
  options["minillm"] = {"name": "minillm", "clip": 0.9}
  options["reopold_refining"] = {"name": "reopold", "switch": 0.0}
  return objectives.create(options.get(name, {"name": name}))


OBJECTIVES = (
  "opd_k1",
  "opd_k1_discount",
  "gkd",
  "gkd_jsd",
  "gkd_top_k",
  "opd_k2",
  "distillm",
  "eopd",
  "reopold",
  "reopold_refining",
  "exopd",
  "minillm",
  "aopd",
  "tropd",
  "constant_negative_advantage",
  "grpo",
  "grpo_kl",
  *toys.TOYS,
)


def make_step(name="gkd", *, mesh=None, devices=1, rules=None, **changes):
  mesh = make_mesh(mesh or {}, jax.devices()[:devices])
  train, decode = layouts(mesh, MeshConfig(**(rules or {})))
  config = OptimizerConfig(
    learning_rate=1e-3, warmup_steps=2, schedule="cosine", weight_decay=0.1
  )
  dtype = changes.pop("compute_dtype", "float32")
  objective = objective_of(name)
  needed = bool(objective.needs.reference)
  scorer = Scorer(
    student=Model(STUDENT, train, dtype),
    teacher=Model(TEACHER, train, dtype),
    reference=Model(REFERENCE, train, dtype) if needed else None,
    vocab_size=STUDENT.vocab_size,
    chunk_tokens=changes.pop("chunk_tokens", 16),
  )
  step = Step(
    decoder=Model(STUDENT, decode, dtype),
    scorer=scorer,
    objective=objective,
    optimizer=optim.build(config, steps=10),
    learning_rate=optim.learning_rate(config, steps=10),
    sampling=SamplingConfig(max_new_tokens=LENGTH),
    stop_ids=STOP_IDS,
    rollouts=ROLLOUTS,
    mixing=RolloutConfig(),
    micro_batches=1,
    steps=10,
    seed=7,
  )
  return dataclasses.replace(step, **changes)


def make_state(step):
  """The state at step 0 and the frozen weights, each in its place."""

  def init(model, seed):
    # With weights of 0.02 all small models are alike: spread them.
    params = model.init(jax.random.key(seed))
    return jax.tree_util.tree_map_with_path(
      lambda path, leaf: leaf if path[-1].key == "scale" else 5.0 * leaf,
      params,
    )

  params = init(step.scorer.student, 0)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, step.abstract_state())
  state = jax.jit(step.init_state, out_shardings=shardings)(params)
  frozen = {"teacher": init(step.scorer.teacher, 1)}
  if step.scorer.reference is not None:
    frozen["reference"] = init(step.scorer.reference, 2)
  return state, frozen


def judged(rollout):
  """A rollout with rewards in {0, 1/2, 1}, as a host stage might give."""
  rewards = jnp.sum(rollout.tokens, axis=1) % 3 / 2
  return dataclasses.replace(rollout, rewards=rewards.astype(jnp.float32))


def make_inputs(privileged=True):
  """Ragged prompts; the privileged ones are longer."""
  rng = np.random.default_rng(0)

  def batch(width, shortest):
    lengths = rng.integers(shortest, width + 1, PROMPTS)
    tokens = rng.integers(0, STUDENT.vocab_size, (PROMPTS, width))
    tokens = np.where(np.arange(width) < lengths[:, None], tokens, 0)
    return PromptBatch(
      tokens=jnp.asarray(tokens, jnp.int32),
      lengths=jnp.asarray(lengths, jnp.int32),
    )

  return StepInputs(
    prompts=batch(WINDOW, 1),
    privileged=batch(WINDOW + 3, 2) if privileged else None,
  )
