"""Whether a run fits the devices of a topology: counted, and compiled."""

import dataclasses
from collections.abc import Callable, Sequence

from opd_jax import blueprint as blueprint_lib
from opd_jax import memory, setup
from opd_jax.blueprint import Blueprint
from opd_jax.config import RunConfig
from opd_jax.memory import Estimate
from opd_jax.models import ModelConfig
from opd_jax.plan import compiling, topology
from opd_jax.plan.compiling import Compiled
from opd_jax.plan.topology import Topology
from opd_jax.sharding import abstract_mesh, make_mesh
from opd_jax.step import Step

# A run from its config with more overrides, "KEY=VALUE" each.
Load = Callable[[Sequence[str]], RunConfig]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counted:
  """A run on a topology, without a compiler.

  Attributes:
    blueprint: of the run.
    topology: its devices.
    step: on a mesh of no devices.
    estimate: of its memory, on one device.
  """

  blueprint: Blueprint
  topology: Topology
  step: Step
  estimate: Estimate

  @property
  def memory(self) -> int:
    """Bytes that a device offers."""
    return self.topology.device.memory


def count(
  config: RunConfig,
  where: Topology,
  read: Callable[[str], ModelConfig],
) -> Counted:
  """Counts the memory of a run.

  Args:
    config: of the run.
    where: it would run.
    read: the architecture of the checkpoint at a path.

  Raises:
    InputError: the config, or a mesh that does not cover the devices, cannot
      span the slices, or divides neither the batch nor a model.
  """
  blueprint = blueprint_lib.of_config(config, read)
  mesh = abstract_mesh(config.mesh.sizes, where.devices, where.islands)
  step = setup.make_step(blueprint, mesh)
  found = memory.estimate(
    step,
    config.batch.prompts,
    config.data.max_prompt_tokens,
    blueprint.teacher_window,
    shared=blueprint.shared,
  )
  return Counted(
    blueprint=blueprint,
    topology=where,
    step=step,
    estimate=dataclasses.replace(found, limit=where.device.memory),
  )


def compile_for(blueprint: Blueprint, where: Topology) -> Compiled:
  """Compiles a run's step for a topology.

  Raises:
    InputError: no compiler, or a mesh that does not cover the devices or
      divides neither the batch nor a model.
  """
  devices = topology.devices(where)
  mesh = make_mesh(blueprint.config.mesh.sizes, devices)
  return compiling.compile_step(blueprint, mesh)
