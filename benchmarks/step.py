"""A step against its floor: python -m benchmarks.step [--chunk_tokens=256].

The reference case: Qwen3 shapes, float32, V = 32,000; student 256 wide x 4
layers x 4/2 heads of 64 x MLP 768, teacher 512 x 8 x 8/4 x 1536; 8 prompts of
64 tokens, 128 new tokens each, full-vocabulary reverse KL. Everything runs on
one device, ceilings and step in the same process, one after the other.

  floor = operations / matrix rate + bytes / read rate

operations: `flops.step`, nothing recomputed. bytes: student weights and the
allocated cache, read once per decoded token. The rates are the best of several
products of [1024, 1024] matrices, and of several sums over 256 MB.
"""

import argparse
import resource
import statistics
import time

import jax
import jax.numpy as jnp

from opd_jax import flops, objectives, optim
from opd_jax.config import OptimizerConfig, RolloutConfig, SamplingConfig
from opd_jax.models import Model, ModelConfig
from opd_jax.programs import Programs
from opd_jax.scoring import Scorer
from opd_jax.sharding import DECODE_RULES, TRAIN_RULES, Layout, make_mesh
from opd_jax.step import Step
from opd_jax.types import PromptBatch, StepInputs

ROWS, PROMPT, COMPLETION, VOCAB = 8, 64, 128, 32_000


def _config(hidden: int, layers: int, heads: int, ffw: int) -> ModelConfig:
  return ModelConfig.from_hf(
    {
      "model_type": "qwen3",
      "vocab_size": VOCAB,
      "hidden_size": hidden,
      "intermediate_size": ffw,
      "num_hidden_layers": layers,
      "num_attention_heads": heads,
      "num_key_value_heads": heads // 2,
      "head_dim": 64,
      "tie_word_embeddings": True,
    }
  )


STUDENT = _config(256, 4, 4, 768)
TEACHER = _config(512, 8, 8, 1536)


def _best_seconds(function, *arguments, repeats=7) -> float:
  jax.block_until_ready(function(*arguments))
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    seconds.append(time.perf_counter() - start)
  return min(seconds)


def ceilings() -> tuple[float, float]:
  """Operations per second in large products, bytes per second of reads."""
  size = 1024
  matrix = jnp.ones((size, size), jnp.float32)
  product = jax.jit(lambda a: a @ a)
  array = jnp.ones(2**26, jnp.float32)
  total = jax.jit(jnp.sum)
  return (
    2 * size**3 / _best_seconds(product, matrix),
    array.nbytes / _best_seconds(total, array),
  )


def make_step(chunk_tokens: int) -> Step:
  mesh = make_mesh({}, jax.devices()[:1])
  train = Layout.create(mesh, TRAIN_RULES)
  config = OptimizerConfig()
  return Step(
    decoder=Model(STUDENT, Layout.create(mesh, DECODE_RULES)),
    scorer=Scorer(
      student=Model(STUDENT, train),
      teacher=Model(TEACHER, train),
      vocab_size=VOCAB,
      chunk_tokens=chunk_tokens,
    ),
    objective=objectives.create({"name": "gkd", "beta": 1.0}),
    optimizer=optim.build(config, steps=100),
    learning_rate=optim.learning_rate(config, steps=100),
    sampling=SamplingConfig(max_new_tokens=COMPLETION),
    stop_ids=(),
    mixing=RolloutConfig(),
    rollouts=1,
    micro_batches=1,
    steps=100,
    seed=0,
  )


def floor_seconds(rate: float, bandwidth: float) -> float:
  operations = flops.step(
    STUDENT,
    (TEACHER,),
    prompts=ROWS,
    rows=ROWS,
    prompt_length=PROMPT,
    completion_length=COMPLETION,
  )
  weights = sum(
    leaf.size * 4
    for leaf in jax.tree.leaves(make_step(1).scorer.student.abstract_params())
  )
  slots = PROMPT + COMPLETION
  heads = STUDENT.num_kv_heads * STUDENT.head_size
  cache = 2 * STUDENT.num_layers * ROWS * slots * heads * 4
  moved = COMPLETION * (weights + cache)
  print(
    f"floor: {operations / 1e9:.0f} GFLOP at {rate / 1e9:.0f} GFLOP/s + "
    f"{moved / 1e9:.1f} GB at {bandwidth / 1e9:.1f} GB/s"
  )
  return operations / rate + moved / bandwidth


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--chunk_tokens", type=int, default=256)
  parser.add_argument("--steps", type=int, default=5)
  options = parser.parse_args()
  step = make_step(options.chunk_tokens)
  student = step.scorer.student
  places = jax.tree.map(lambda leaf: leaf.sharding, step.abstract_state())
  state = jax.jit(step.init_state, out_shardings=places)(
    student.init(jax.random.key(0))
  )
  frozen = {"teacher": step.scorer.model("teacher").init(jax.random.key(1))}
  tokens = jnp.ones((ROWS, PROMPT), jnp.int32)
  inputs = StepInputs(
    prompts=PromptBatch(
      tokens=jax.device_put(tokens, student.layout.sharding(("batch", None))),
      lengths=jax.device_put(
        jnp.full(ROWS, PROMPT, jnp.int32), student.layout.sharding(("batch",))
      ),
    )
  )
  programs = Programs(step, "fused")
  programs.compile(state, frozen, inputs)
  print(
    f"{jax.devices()[0].device_kind}, jax {jax.__version__}; compiled in "
    f"{programs.compile_seconds:.1f} s"
  )
  programs.time_split(state, frozen, inputs)
  seconds, splits = [], []
  rate, bandwidth = ceilings()
  for _ in range(options.steps):
    splits.append(programs.time_split(state, frozen, inputs))
    start = time.perf_counter()
    state, _, _ = programs(state, frozen, inputs)
    jax.block_until_ready(state)
    seconds.append(time.perf_counter() - start)
  step_seconds = statistics.median(seconds)
  sample, score = (
    statistics.median(split[name] for split in splits)
    for name in ("time/sample", "time/score")
  )
  floor = floor_seconds(rate, bandwidth)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  print(
    f"step {step_seconds:.2f} s (median of {len(seconds)}, {min(seconds):.2f} "
    f"to {max(seconds):.2f}): sample {sample:.2f}, score {score:.2f}, update "
    f"{step_seconds - sample - score:.2f}"
  )
  print(
    f"{step_seconds / floor:.2f} x the floor of {floor:.2f} s; "
    f"{ROWS * COMPLETION / step_seconds:.0f} tokens/s; peak memory of the "
    f"process {peak:.2f} GiB, compilation included"
  )


if __name__ == "__main__":
  main()
