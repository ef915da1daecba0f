"""Every file in configs/ is read, and every key is used by someone.

The meshes of pods are tried on the real shapes of their models without a
device: an abstract mesh has sizes only.
"""

import ast
import dataclasses
import importlib.util
import math
import pathlib
import re
import runpy
import types
import typing

import jax
import pytest
from jax.experimental import mesh_utils

from opd_jax import blueprint, parsing, setup, sft
from opd_jax import config as config_lib
from opd_jax.errors import InputError
from opd_jax.models import published
from opd_jax.plan import topology
from opd_jax.sharding import MESH_AXES, abstract_mesh, make_mesh

REPO = pathlib.Path(__file__).resolve().parent.parent
FOLDER = REPO / "configs"
CONFIGS = sorted(
  path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.py")
)
# Of a config whose mesh takes all devices.
DEVICES = 8


def mesh_of(config):
  """A mesh of no devices: those of its topology, or else `DEVICES`."""
  sizes = config.mesh.sizes
  devices, islands = math.prod(sizes.values()), 1
  topology_name = getattr(config, "topology", None)
  if topology_name is not None:
    where = topology.parse(topology_name)
    devices, islands = where.devices, where.islands
  elif devices < 0:
    devices = DEVICES
  return abstract_mesh(sizes, devices, islands)


def locations(name):
  """The experiments of a file: one, or one for each of its topologies."""
  topologies = runpy.run_path(str(FOLDER / name)).get("TOPOLOGIES")
  path = f"configs/{name}"
  return [path] if topologies is None else [f"{path}:{t}" for t in topologies]


def is_sft(name):
  """Whether its docstring launches it by `opd-jax sft`."""
  return (
    f"opd-jax sft --config=configs/{name}"
    in (REPO / "configs" / name).read_text()
  )


@pytest.mark.parametrize("name", [name for name in CONFIGS if is_sft(name)])
def test_sft_config_parses_and_its_mesh_divides_its_model(name):
  config = parsing.load(config_lib.SftConfig, str(REPO / "configs" / name))
  student = published.architecture(config.student.path)
  assert config.batch.row_tokens <= student.max_positions
  # Only what `make_step` reads; the rest needs files.
  parts = types.SimpleNamespace(
    config=config, student=student, vocab_size=student.vocab_size
  )
  sft.make_step(parts, mesh_of(config))


@pytest.mark.parametrize(
  "location",
  [one for name in CONFIGS if not is_sft(name) for one in locations(name)],
)
def test_config_parses_and_its_mesh_divides_its_models(location, shared_data):
  path = REPO / location.partition(":")[0]
  if "/shared/data" in path.read_text():
    location = f"{location}:{shared_data}"
  config = parsing.load(config_lib.RunConfig, str(REPO / location))
  parts = blueprint.of_config(config, published.architecture)
  step = setup.make_step(parts, mesh_of(config))
  for role in ("student", "teacher"):
    model = step.scorer.model(role)
    places = [
      leaf.sharding for leaf in jax.tree.leaves(model.abstract_params())
    ]
    if config.mesh.tensor > 1:
      assert any("tensor" in place.spec for place in places), role


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
@pytest.mark.parametrize(
  "location",
  [one for name in CONFIGS if "pods/" in name for one in locations(name)],
)
def test_the_mesh_of_a_pod_takes_whole_sides_of_its_torus(
  location, monkeypatch
):
  """On the devices of its topology, of which an abstract mesh knows nothing.

  Where jax refuses, `make_mesh` splits sides; on v5e jax does so itself.
  """
  monkeypatch.setattr(mesh_utils, "create_device_mesh", None)
  config = parsing.load(config_lib.RunConfig, str(REPO / location))
  where = topology.parse(config.topology)
  with topology.quiet():
    mesh = make_mesh(config.mesh.sizes, topology.devices(where))
  assert mesh.size == where.devices
  assert dict(mesh.shape) == dict(mesh_of(config).shape)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_tells_how_to_launch_it(name):
  text = (REPO / "configs" / name).read_text()
  docstring = ast.get_docstring(ast.parse(text)) or ""
  assert f"--config=configs/{name}" in docstring
  assert "--workdir=" in docstring
  if "/" in name:
    assert f"opd-jax plan --config=configs/{name}" in docstring


@pytest.mark.parametrize(
  ("location", "message"),
  [
    (
      "configs/pods/qwen3_8b_from_32b.py:v4-8",
      r"is not for 'v4-8'; write .*qwen3_8b_from_32b\.py:NAME with one of "
      "v5p:4x4x4, v6e-64",
    ),
    (
      "configs/pods/llama31_8b_from_70b.py:x",
      r"takes no argument; write .*llama31_8b_from_70b\.py alone",
    ),
  ],
)
def test_an_argument_that_a_config_does_not_know(location, message):
  with pytest.raises(InputError, match=message):
    parsing.read(str(REPO / location))


@pytest.mark.parametrize(
  ("cls", "key", "parts"),
  [
    (
      config_lib.RunConfig,
      "objective",
      ["`name` of an objective, and its own", '"objective": {"name": "gkd"}'],
    ),
    (config_lib.RunConfig, "steps", ["updates to make", '"steps": 100']),
    (config_lib.RunConfig, "student", ['"student": {"path": "']),
    (config_lib.RunConfig, "teacher", ["frozen", '"teacher": {"path": "']),
    (config_lib.RunConfig, "data", ["the prompts", '"data": {"sources": {']),
    (config_lib.RunConfig, "data.sources", ["a name of your own; several"]),
    (config_lib.SftConfig, "data.sources", ["longer than a packed row"]),
    (config_lib.RunConfig, "data.sources.x.path", ["TensorFlow Dataset"]),
    (config_lib.RunConfig, "teacher.path", ['"path": "Qwen/Qwen3-8B"']),
    (
      config_lib.SftConfig,
      "student.path",
      ["`gs://bucket/folder`, or `org/name`"],
    ),
  ],
)
def test_a_missing_key_is_explained(cls, key, parts):
  """In words of its docstring, with what could be written."""
  values = {
    "student": {"path": "s"},
    "data": {"sources": {"x": {"path": "rows.jsonl"}}},
    "steps": 1,
  }
  if cls is config_lib.RunConfig:
    values |= {"teacher": {"path": "t"}, "objective": {"name": "gkd"}}
  *groups, last = key.split(".")
  inner = values
  for group in groups:
    inner = inner[group]
  del inner[last]
  with pytest.raises(InputError) as caught:
    parsing.parse(cls, values)
  message = str(caught.value)
  assert message.startswith(f"config key {key} is missing: ")
  assert all(part in message for part in parts), message
  # The example is a value of the right kind.
  _, _, example = message.partition("; write ")
  name, _, text = example.partition(": ")
  assert ast.literal_eval(name) == last
  inner[last] = ast.literal_eval(text)
  parsing.parse(cls, values)


def test_every_required_key_has_an_example():
  required = {
    field.name
    for run in (config_lib.RunConfig, config_lib.SftConfig)
    for cls, _, _ in fields_of(run)
    for field in dataclasses.fields(cls)
    if field.default is dataclasses.MISSING
    and field.default_factory is dataclasses.MISSING
  }
  assert required <= parsing._EXAMPLES.keys()


def fields_of(cls, group="config"):
  """(class, its name in a config, field) for all below a config dataclass."""
  for name, hint in typing.get_type_hints(cls).items():
    yield cls, group, name
    optional = isinstance(hint, types.UnionType)
    for option in typing.get_args(hint) if optional else (hint,):
      if dataclasses.is_dataclass(option):
        yield from fields_of(option, name)


def test_every_key_is_read():
  """A config field nobody reads is a bug.

  Read means: `group.field`, or `config.field` in a module that knows the class.
  """
  read = set()
  for path in (REPO / "opd_jax").rglob("*.py"):
    if path.parent == REPO / "opd_jax" / "config":
      continue
    source = path.read_text()
    known = set(re.findall(r"\w+(?:Config|ModelSource)\b", source))
    for node in ast.walk(ast.parse(source)):
      if isinstance(node, ast.Attribute):
        owner = ast.unparse(node.value).rpartition(".")[2]
        read.add((owner, node.attr))
        read |= {(cls, node.attr) for cls in known if owner == "config"}
  # The sizes of a mesh are handed to `make_mesh` as a whole.
  unread = {
    f"{group}.{name}"
    for run in (config_lib.RunConfig, config_lib.SftConfig)
    for cls, group, name in fields_of(run)
    if not (cls is config_lib.MeshConfig and name in MESH_AXES)
    and not {(group, name), (cls.__name__, name)} & read
  }
  assert not unread
