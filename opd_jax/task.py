"""What the loop asks of the kinds of runs, and what it is given beside them.

A `Task` is what `train.py` and `sft.py` differ in: the state, the compiled step
and what is told about it. A `Data` gives its batches; a `Measurement` looks at
the weights from time to time.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from opd_jax.config import RunConfig, SftConfig
from opd_jax.meter import Work
from opd_jax.models import Model
from opd_jax.types import Params, TrainState
from opd_jax.update import Metrics


class Task(Protocol):
  """What is trained, and how; see `train.Distillation`."""

  @property
  def kind(self) -> str:
    """The command: "train" or "sft"."""
    ...

  @property
  def config(self) -> RunConfig | SftConfig:
    """Of the run."""
    ...

  @property
  def student(self) -> Model:
    """In the training layout."""
    ...

  @property
  def compile_seconds(self) -> float:
    """Spent compiling so far."""
    ...

  def describe(self) -> Iterable[str]:
    """What the run is about to do, in a few lines."""
    ...

  def abstract_state(self) -> TrainState:
    """Shapes and places of the state."""
    ...

  def initial_state(self) -> TrainState:
    """The state before the first step."""
    ...

  def weights(self, state: TrainState) -> Params:
    """The student's weights, with its adapters if these are what is trained."""
    ...

  def compile(self, state: TrainState) -> None:
    """All that comes before the first step: frozen weights, programs."""
    ...

  def baseline(self) -> Mapping[str, float]:
    """What is measured of frozen models, once, before the first step."""
    ...

  def step(
    self, state: TrainState, batch: Any
  ) -> tuple[TrainState, Metrics, Any]:
    """Runs a step, which uses up the state.

    Returns:
      The new state, its metrics, and what `samples` shows.
    """
    ...

  def observe(self, step: int, values: Mapping[str, float]) -> None:
    """Hears what was measured after so many steps."""
    ...

  def get_state(self) -> dict[str, Any]:
    """What a checkpoint keeps besides the train state, as JSON."""
    ...

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Goes on from what `get_state` gave."""
    ...

  def samples(self, shown: Any) -> Sequence[Mapping[str, Any]]:
    """A few texts of a step, for the log."""
    ...

  def time_split(self, state: TrainState, batch: Any) -> Mapping[str, float]:
    """Seconds of the step's parts, by metric."""
    ...

  def work(self, record: Mapping[str, float]) -> Work:
    """What a step did, from its metrics."""
    ...


class Data(Iterator[Any], Protocol):
  """Endless batches of the host, the same on every process."""

  def get_state(self) -> dict[str, Any]:
    """Where it stands, as JSON."""
    ...

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Goes back to where it stood."""
    ...


class Measurement(Protocol):
  """What is measured of the weights, apart from the steps.

  It is made at the start, every so many steps, with every regular checkpoint
  and at the end. All processes call it.
  """

  @property
  def every(self) -> int:
    """Steps between two."""
    ...

  def __call__(self, params: Params) -> Mapping[str, float]:
    """Values by metric."""
    ...

  def examples(self, count: int) -> Sequence[Mapping[str, Any]]:
    """A few texts of the last one, for the summary; JSON."""
    ...
