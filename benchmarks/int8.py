"""What int8 weights cost a teacher, in nats of its next-token distribution.

    python -m benchmarks.int8 --model=checkpoints/arith_teacher \\
      --texts=FILE.jsonl --field=text --rows=16 --tokens=128

Prints, over the tokens of the texts, the mean of KL(float32 || other) for the
model as int8 (see `opd_jax/models/quantize.py`), in bfloat16, and in both, and
how often the likeliest id stays the same.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator, Sequence

import jax
import numpy as np
import scipy.special

from opd_jax import tokenizer
from opd_jax.models import Model, hf
from opd_jax.sharding import TRAIN_RULES, Layout, make_mesh

OTHERS = {
  "int8": {"weight_dtype": "int8"},
  "bfloat16": {"compute_dtype": "bfloat16"},
  "int8, bfloat16": {"weight_dtype": "int8", "compute_dtype": "bfloat16"},
}


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, ids, positions):
  states = model.hidden(params, ids, positions)
  return model.logits(model.split_head(params)[1], states)


def compare(
  folder: str | pathlib.Path,
  texts: Sequence[str],
  length: int,
  others: Sequence[str] = tuple(OTHERS),
) -> Iterator[tuple[str, float, float]]:
  """Name, mean KL in nats, and agreement of the likeliest id, of each other.

  Args:
    folder: of a checkpoint.
    texts: whose tokens are looked at.
    length: tokens of each, at most.
    others: keys of `OTHERS`.
  """
  tokens = tokenizer.load(hf.resolve(folder))
  rows = [tokens.encode(text)[:length] for text in texts]
  ids = np.zeros((len(rows), length), np.int32)
  positions = np.full_like(ids, -1)
  for row, found in enumerate(rows):
    ids[row, : len(found)] = found
    positions[row, : len(found)] = range(len(found))
  layout = Layout.create(make_mesh({}, jax.devices()[:1]), TRAIN_RULES)
  whole = Model(hf.read_config(folder), layout)

  def logprobs(model: Model) -> np.ndarray:
    params = hf.load(folder, model, model.compute_dtype)
    logits = np.asarray(_logits(model, params, ids, positions), np.float64)
    logits = logits[positions >= 0]
    return logits - scipy.special.logsumexp(logits, -1, keepdims=True)

  want = logprobs(whole)
  for name in others:
    got = logprobs(dataclasses.replace(whole, **OTHERS[name]))
    divergence = np.sum(np.exp(want) * (want - got), -1)
    agreement = want.argmax(-1) == got.argmax(-1)
    yield name, float(divergence.mean()), float(agreement.mean())


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--model", required=True)
  parser.add_argument("--texts", required=True)
  parser.add_argument("--field", default="text")
  parser.add_argument("--rows", type=int, default=16)
  parser.add_argument("--tokens", type=int, default=128)
  flags = parser.parse_args()
  lines = pathlib.Path(flags.texts).read_text(encoding="utf-8").splitlines()
  texts = [json.loads(line)[flags.field] for line in lines[: flags.rows]]
  for name, divergence, agreement in compare(flags.model, texts, flags.tokens):
    print(f"{name:15} {divergence:.2g} nats, {100 * agreement:.1f} % the same")


if __name__ == "__main__":
  main()
