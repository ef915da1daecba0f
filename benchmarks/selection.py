"""What choosing tokens saves: python -m benchmarks.selection [--rounds=5].

The update of the reference case of `benchmarks.step` (V = 32,000, 8 rows of 128
new tokens, full-vocabulary reverse KL), with all tokens and with a part of
them, the heads in chunks of 256 tokens and in one. The rollout is the same for
all and is not run again. Every round times every program once, in turn.

  heads   operations of the vocabulary heads, over those with all tokens:
          (first pass + fraction x loop) / loop, from widths alone
  memory  temporaries of the update by the compiler's account
"""

import argparse
import dataclasses
import statistics
import time

import jax
import numpy as np

from benchmarks import step as reference
from opd_jax.config import SelectionConfig
from opd_jax.programs import compiled
from opd_jax.selector import Selector
from opd_jax.types import PromptBatch, StepInputs

CHUNKED, WHOLE = 256, 10**6
CASES = (
  None,
  *(
    SelectionConfig(name=name, fraction=fraction)
    for name in ("soft_or", "entropy")
    for fraction in (0.5, 0.2, 0.1)
  ),
)


def heads(selection: SelectionConfig | None) -> float:
  """Operations of the heads, over those of the loop over all tokens."""
  if selection is None:
    return 1.0
  student = reference.STUDENT.hidden_size
  teacher = reference.TEACHER.hidden_size
  first = student + (teacher if selection.name == "soft_or" else 0)
  return first / (3 * student + teacher) + selection.fraction


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rounds", type=int, default=5)
  options = parser.parse_args()
  step = reference.make_step(CHUNKED)
  student = step.scorer.student
  state = step.place_state(student.init(jax.random.key(0)))
  frozen = {"teacher": step.scorer.model("teacher").init(jax.random.key(1))}
  shape = (reference.ROWS, reference.PROMPT)
  place = student.layout.place_rows
  inputs = StepInputs(
    prompts=PromptBatch(
      tokens=place(np.ones(shape, np.int32)),
      lengths=place(np.full(shape[0], shape[1], np.int32)),
    )
  )
  rollout = jax.jit(step.rollout)(state.params, frozen, state.step, inputs)
  arguments = (state, frozen, inputs, rollout)
  programs = {}
  for chunk_tokens in (CHUNKED, WHOLE):
    step = reference.make_step(chunk_tokens)
    for case in CASES:
      selector = case and Selector(config=case, vocab_size=reference.VOCAB)
      changed = dataclasses.replace(step, selector=selector)
      programs[chunk_tokens, case] = compiled(changed.update_from, arguments)
      print(f"compiled {len(programs)} of {2 * len(CASES)}", flush=True)
  seconds = {key: [] for key in programs}
  for _ in range(options.rounds + 1):
    for key, program in programs.items():
      start = time.perf_counter()
      jax.block_until_ready(program(*arguments))
      seconds[key].append(time.perf_counter() - start)
  print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
  print("| loss on | heads | chunk | update | memory |")
  print("|---|---|---|---|---|")
  for key, program in programs.items():
    chunk_tokens, case = key
    name = "all tokens" if case is None else f"{case.name} {case.fraction:g}"
    whole = "one" if chunk_tokens == WHOLE else f"{CHUNKED}"
    # The first round warms up.
    median = statistics.median(seconds[key][1:])
    memory = program.memory_analysis().temp_size_in_bytes / 2**20
    print(
      f"| {name} | {heads(case):.2f} | {whole} | {median:.2f} s "
      f"({min(seconds[key][1:]):.2f} to {max(seconds[key][1:]):.2f}) | "
      f"{memory:.0f} MiB |"
    )


if __name__ == "__main__":
  main()
