"""The optimizer: an optax chain from the config, and where its state lives."""

from typing import Any

import jax
import optax

from opd_jax.config import OptimizerConfig
from opd_jax.types import Params


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """Linear warm-up to the peak rate, then the schedule until `steps`.

  The first of n warm-up steps has rate peak / n, the last the peak itself. The
  step may be a fraction: update u of U in step n is at n + u / U.
  """
  peak = config.learning_rate
  after = max(steps - config.warmup_steps - 1, 1)
  final = peak * config.final_fraction
  body = {
    "constant": optax.constant_schedule(peak),
    "linear": optax.linear_schedule(peak, final, after),
    "cosine": optax.cosine_decay_schedule(peak, after, config.final_fraction),
  }[config.schedule]
  if config.warmup_steps == 0:
    return body
  first = peak / config.warmup_steps
  warmup = optax.linear_schedule(first, peak, config.warmup_steps - 1)
  return optax.join_schedules([warmup, body], [config.warmup_steps])


def build(
  config: OptimizerConfig, steps: int, updates: int = 1
) -> optax.GradientTransformation:
  """Global-norm clipping, then AdamW; decay for matrices only.

  Args:
    config: of the optimizer.
    steps: of the whole run.
    updates: U, per step.
  """
  rate = learning_rate(config, steps)

  def decayed(params: Params) -> Any:
    return jax.tree_util.tree_map_with_path(
      lambda path, _: path[-1].key not in ("scale", "bias"), params
    )

  adamw = optax.adamw(
    rate if updates == 1 else lambda count: rate(count / updates),
    b1=config.b1,
    b2=config.b2,
    eps=config.eps,
    weight_decay=config.weight_decay,
    mask=decayed,
  )
  if config.clip_norm is None:
    return adamw
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def state_shardings(
  optimizer: optax.GradientTransformation,
  params: Params,
  param_shardings: Any,
  replicated: jax.sharding.Sharding,
) -> Any:
  """Moments live where their weights live, the rest everywhere."""
  state = jax.eval_shape(optimizer.init, params)
  return optax.tree.map_params(
    optimizer.init,
    lambda _, sharding: sharding,
    state,
    param_shardings,
    transform_non_params=lambda _: replicated,
  )
