"""`opd-jax generate`: complete prompts."""

from collections.abc import Sequence
from typing import Any

from opd_jax.cli.flags import check_file, new, parse, write
from opd_jax.errors import InputError


def run(arguments: Sequence[str]) -> int:
  """Runs the command; returns the exit status."""
  from absl import flags

  values = new()
  options: dict[str, Any] = {"flag_values": values}
  flags.DEFINE_string("model", None, "checkpoint: DIR or org/name", **options)
  flags.DEFINE_multi_string("prompt", None, "text to complete", **options)
  flags.DEFINE_integer("max_new_tokens", 128, "tokens at most", **options)
  flags.DEFINE_float(
    "temperature", 1.0, "divides the logits; 0 is greedy", **options
  )
  flags.DEFINE_integer("top_k", None, "likeliest k tokens only", **options)
  flags.DEFINE_float("top_p", None, "nucleus of this mass only", **options)
  flags.DEFINE_float("min_p", None, "least share of the top mass", **options)
  flags.DEFINE_integer("samples", 1, "completions per prompt", **options)
  flags.DEFINE_integer("seed", 0, "of the draws", **options)
  flags.DEFINE_integer("tensor", 1, "devices to spread over", **options)
  flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "to compute in", **options
  )
  flags.DEFINE_string(
    "json", None, "file to write tokens and logprobs to", **options
  )
  if not parse(values, "generate", arguments, required=("model", "prompt")):
    return 0
  from opd_jax import parsing
  from opd_jax.config import SamplingConfig

  names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p")
  sampling = parsing.parse(
    SamplingConfig, {name: values[name].value for name in names}
  )
  if values.samples < 1:
    raise InputError(f"--samples must be >= 1, got {values.samples}")
  if values.json:
    check_file("--json", values.json)
  from opd_jax import generate

  completions = generate.generate(
    values.model,
    values.prompt,
    sampling,
    samples=values.samples,
    seed=values.seed,
    compute_dtype=values.dtype,
    tensor=values.tensor,
  )
  for completion in completions:
    print(f"{completion.prompt}{completion.text}")
  if values.json:
    write(values.json, [vars(completion) for completion in completions])
  return 0
