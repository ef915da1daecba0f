"""What every test runs under: eight CPU devices, no network, strict types.

Environment variables come first, because jax reads them when it is imported;
processes that tests start inherit them.
"""

import os
import pathlib
import sys

REPO = pathlib.Path(__file__).resolve().parent.parent

if "jax" in sys.modules:
  raise RuntimeError(
    "jax was imported before tests/conftest.py could set its environment; "
    "find the pytest plugin or option that imports it"
  )

for _flag in (
  "--xla_force_host_platform_device_count=8",
  # Tests compile far longer than they run: machine code is not optimised.
  "--xla_backend_optimization_level=0",
):
  if _flag.partition("=")[0] not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}"
for _name, _value in {
  "JAX_PLATFORMS": "cpu",
  # Compiled programs are kept between runs; `make clean` forgets them.
  "JAX_COMPILATION_CACHE_DIR": str(REPO / ".cache" / "jax"),
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
  "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  "HF_HUB_OFFLINE": "1",
  "TOKENIZERS_PARALLELISM": "false",
}.items():
  os.environ.setdefault(_name, _value)

# ruff: noqa: E402
import jax
import jaxtyping
import pytest

# Checks the annotations of these packages at every call. Not `types.py`: its
# dataclasses must also hold the ShapeDtypeStructs of `jax.eval_shape`.
jaxtyping.install_import_hook(
  ["opd_jax.objectives", "opd_jax.sampling"], "beartype.beartype"
)

# Tests under these folders fail where dtypes mix or ranks broadcast silently
# ([T] against [B, T]). Elsewhere third-party code would trip over it.
STRICT_FOLDERS = (REPO / "tests/objectives", REPO / "tests/sampling")


@pytest.fixture(autouse=True)
def strict_promotion(request):
  """Strict dtype and rank promotion under `STRICT_FOLDERS`."""
  strict = any(p in request.node.path.parents for p in STRICT_FOLDERS)
  if not strict or request.node.get_closest_marker("loose_promotion"):
    yield
    return
  with (
    jax.numpy_dtype_promotion("strict"),
    jax.numpy_rank_promotion("raise"),
  ):
    yield


@pytest.fixture(scope="session")
def shared_data():
  """The folder of real prompts, tokenizers and models beside the checkout."""
  default = REPO.parent / "shared" / "data"
  folder = pathlib.Path(os.environ.get("OPD_JAX_SHARED_DATA", default))
  if not folder.is_dir():
    pytest.skip(
      f"no shared data at {folder}; set OPD_JAX_SHARED_DATA to its folder"
    )
  return folder
