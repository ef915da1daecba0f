"""Time of one token's draw: ours against jax.random.categorical.

    python -m benchmarks.draw

Prints milliseconds (median) for 8 rows of a 32,000 and a 151,936 column
vocabulary, as ratios to `jax.random.categorical`. Our draw also returns the
log-probability of its token; categorical does not.
"""

import functools
import statistics
import time
from collections.abc import Callable

import jax

from opd_jax.config import SamplingConfig
from opd_jax.sampling import draw, filters

ROWS = 8
COLUMNS = (32_000, 151_936)
REPEATS = 50


def milliseconds(function: Callable[[], object]) -> float:
  """Median time of a call, after one to compile."""
  jax.block_until_ready(function())
  times = []
  for _ in range(REPEATS):
    start = time.perf_counter()
    jax.block_until_ready(function())
    times.append(time.perf_counter() - start)
  return 1e3 * statistics.median(times)


def filtered(logits: jax.Array, uniforms: jax.Array, config: SamplingConfig):
  """A draw after filters."""
  return draw.draw(filters.apply(logits, config), uniforms)


def main() -> None:
  """Prints the table."""
  key = jax.random.key(0)
  for columns in COLUMNS:
    logits = 3 * jax.random.normal(key, (ROWS, columns))
    uniforms = jax.random.uniform(key, (ROWS,))
    calls = {
      "categorical": functools.partial(
        jax.jit(jax.random.categorical), key, logits
      ),
      "draw": functools.partial(jax.jit(draw.draw), logits, uniforms),
      "greedy": functools.partial(jax.jit(draw.greedy), logits),
    }
    for name, config in {
      "top_k=50, draw": SamplingConfig(top_k=50),
      "top_p=0.95, draw": SamplingConfig(top_p=0.95),
      "min_p=0.05, draw": SamplingConfig(min_p=0.05),
    }.items():
      calls[name] = functools.partial(
        jax.jit(filtered, static_argnums=2), logits, uniforms, config
      )
    base = None
    for name, call in calls.items():
      elapsed = milliseconds(call)
      base = base or elapsed
      print(
        f"[{ROWS}, {columns}] {name:17} {elapsed:8.3f} ms  "
        f"{elapsed / base:6.3f} of categorical"
      )


if __name__ == "__main__":
  main()
