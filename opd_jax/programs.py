"""The compiled programs of a step, made before the first of them runs.

A program compiled ahead of time cannot recompile: arguments of another shape
or place raise instead.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from opd_jax.step import Step
from opd_jax.types import Rollout, StepInputs, TrainState
from opd_jax.update import Frozen, Metrics


def shape_of(tree: Any) -> Any:
  """The `ShapeDtypeStruct`s of a tree of placed arrays."""
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=leaf.sharding
    ),
    tree,
  )


def compiled(
  function: Callable,
  arguments: Any,
  compiler_options: dict[str, bool | str] | None = None,
  **options: Any,
) -> Any:
  """A function compiled for arguments of these shapes and places, no other."""
  lowered = jax.jit(function, **options).lower(*shape_of(arguments))
  return lowered.compile(compiler_options)


class Programs:
  """A step as "fused" (one program) or "split" (two).

  Attributes:
    names: of the programs of a step, in order.
    compile_seconds: spent compiling so far.
    compiled: programs compiled so far, by name.
  """

  def __init__(
    self,
    step: Step,
    mode: Literal["fused", "split"],
    compiler_options: dict[str, bool | str] | None = None,
  ):
    """Compiles nothing yet; see `compile`."""
    self._compiler_options = compiler_options
    self._step = step
    self._mode = mode
    # Metrics and drawn tokens are small, and every host reads them.
    self._everywhere = step.scorer.student.layout.replicated()
    self.names = ("train",) if mode == "fused" else ("rollout", "update")
    self.compile_seconds = 0.0
    self.compiled: dict[str, Any] = {}

  def compile(
    self, state: TrainState, frozen: Frozen, inputs: StepInputs
  ) -> None:
    """Compiles what `__call__` runs.

    Args:
      state: arrays or `ShapeDtypeStruct`s with their shardings; donated.
      frozen: likewise; never donated.
      inputs: likewise.
    """
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = self._step
    if self._mode == "fused":
      self._compile(
        "train",
        step.train,
        (state, frozen, inputs),
        donate_argnums=0,
        out_shardings=(places, self._everywhere, self._everywhere),
      )
      return
    self._compile_rollout(state, frozen, inputs)
    self._compile(
      "update",
      step.update_from,
      (state, frozen, inputs, self._judged_shape(state, frozen, inputs)),
      donate_argnums=0,
      out_shardings=(places, self._everywhere),
    )

  def __call__(
    self,
    state: TrainState,
    frozen: Frozen,
    inputs: StepInputs,
    host: Callable[[Rollout], Rollout] | None = None,
  ) -> tuple[TrainState, Metrics, Rollout]:
    """Runs a step; `state` is used up.

    Args:
      state: before the step.
      frozen: weights of the other models.
      inputs: of the step.
      host: what the host adds to the completions; only in "split".
    """
    if self._mode == "fused":
      return self.compiled["train"](state, frozen, inputs)
    rollout = self.compiled["rollout"](*_drawing(state, frozen, inputs))
    if host is not None:
      rollout = host(rollout)
    state, metrics = self.compiled["update"](state, frozen, inputs, rollout)
    return state, metrics, rollout

  def time_split(
    self, state: TrainState, frozen: Frozen, inputs: StepInputs
  ) -> dict[str, float]:
    """Seconds of sampling and of teacher scoring, each run by itself.

    Nothing of the run changes. The programs are compiled at the first call.
    """
    self._compile_rollout(state, frozen, inputs)

    def score(frozen: Frozen, inputs: StepInputs, rollout: Rollout) -> Any:
      return self._step.score(frozen, self._step.scoring_batch(rollout, inputs))

    shape = self._rollout_shape(state, frozen, inputs)
    self._compile("score", score, (frozen, inputs, shape))
    jax.block_until_ready(state)
    rollout, sample_seconds = _timed(
      self.compiled["rollout"], *_drawing(state, frozen, inputs)
    )
    _, score_seconds = _timed(self.compiled["score"], frozen, inputs, rollout)
    return {"time/sample": sample_seconds, "time/score": score_seconds}

  def _compile_rollout(
    self, state: TrainState, frozen: Frozen, inputs: StepInputs
  ) -> None:
    self._compile(
      "rollout",
      self._step.rollout,
      _drawing(state, frozen, inputs),
      out_shardings=self._everywhere,
    )

  def _rollout_shape(
    self, state: TrainState, frozen: Frozen, inputs: StepInputs
  ) -> Rollout:
    shapes = jax.eval_shape(
      self._step.rollout, *_drawing(state, frozen, inputs)
    )
    return jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=self._everywhere
      ),
      shapes,
    )

  def _judged_shape(
    self, state: TrainState, frozen: Frozen, inputs: StepInputs
  ) -> Rollout:
    """Of a rollout behind the host stage."""
    rollout = self._rollout_shape(state, frozen, inputs)
    if not self._step.objective.needs.rewards:
      return rollout
    rewards: Any = jax.ShapeDtypeStruct(
      rollout.stop_reason.shape, jnp.float32, sharding=self._everywhere
    )
    return dataclasses.replace(rollout, rewards=rewards)

  def _compile(
    self, name: str, function: Callable, arguments: Any, **options: Any
  ) -> None:
    if name in self.compiled:
      return
    start = time.monotonic()
    self.compiled[name] = compiled(
      function, arguments, self._compiler_options, **options
    )
    self.compile_seconds += time.monotonic() - start


def _drawing(state: TrainState, frozen: Frozen, inputs: StepInputs) -> Any:
  """The arguments of a rollout."""
  return state.params, frozen, state.step, inputs, state.replay


def _timed(function: Callable, *arguments: Any) -> tuple[Any, float]:
  start = time.monotonic()
  result = jax.block_until_ready(function(*arguments))
  return result, time.monotonic() - start
