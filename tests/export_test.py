"""Export: what comes back, what is carried along, what is refused."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from opd_jax.errors import InputError
from opd_jax.export import export
from opd_jax.models import Model, hf
from tests.models import tiny


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_export_then_load_gives_the_same_weights(name, tmp_path):
  model, params = tiny.model(name), tiny.params(name)
  export(params, model, None, tmp_path / "out")
  assert hf.read_config(tmp_path / "out") == model.config
  got = hf.load(tmp_path / "out", model)
  jax.tree.map(np.testing.assert_array_equal, got, params)


def test_spread_experts_are_written_one_by_one(tmp_path):
  params = tiny.params("qwen3_moe")
  layout = tiny.layout({"fsdp": 2, "tensor": 2, "expert": 2})
  spread = Model(tiny.CONFIGS["qwen3_moe"], layout)
  places = jax.tree.map(lambda leaf: leaf.sharding, spread.abstract_params())
  export(jax.device_put(params, places), spread, None, tmp_path / "out")
  got = hf.load(tmp_path / "out", tiny.model("qwen3_moe"))
  jax.tree.map(np.testing.assert_array_equal, got, params)


def test_a_real_checkpoint_goes_through_eight_devices_unchanged(
  shared_data, tmp_path
):
  source = shared_data / "models" / "babyllama-student"
  layout = tiny.layout({"replica": 2, "fsdp": 2, "tensor": 2})
  model = Model(hf.read_config(source), layout)
  export(hf.load(source, model), model, source, tmp_path / "a" / "out")
  out = tmp_path / "a" / "out"
  got, want = (load_file(path / "model.safetensors") for path in (out, source))
  assert set(got) == set(want)
  for name, value in want.items():
    np.testing.assert_array_equal(got[name], value)
  assert json.loads((out / "config.json").read_text()) == json.loads(
    (source / "config.json").read_text()
  )
  carried = {
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
  }
  assert {file.name for file in out.iterdir()} == carried | {
    "config.json",
    "model.safetensors",
  }
  for name in carried:
    assert (out / name).read_bytes() == (source / name).read_bytes()
  assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_large_weights_are_written_as_files_with_an_index(tmp_path):
  model, params = tiny.model("qwen3"), tiny.params("qwen3")
  limit = 10_000
  export(params, model, None, tmp_path / "out", "bfloat16", limit)
  index = json.loads(
    (tmp_path / "out" / "model.safetensors.index.json").read_text()
  )
  files = sorted((tmp_path / "out").glob("*.safetensors"))
  assert len(files) > 2
  assert {file.name for file in files} == set(index["weight_map"].values())
  tensors = {}
  for file in files:
    held = load_file(file)
    assert sum(value.nbytes for value in held.values()) <= limit
    assert all(index["weight_map"][name] == file.name for name in held)
    tensors.update(held)
  total = sum(value.nbytes for value in tensors.values())
  assert index["metadata"]["total_size"] == total
  assert {value.dtype for value in tensors.values()} == {
    np.dtype(ml_dtypes.bfloat16)
  }
  got = hf.load(tmp_path / "out", model, "bfloat16")
  want = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params)
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_the_sources_config_keeps_its_fields_but_for_the_dtype(tmp_path):
  model, params = tiny.model("llama"), tiny.params("llama")
  export(params, model, None, tmp_path / "source")
  file = tmp_path / "source" / "config.json"
  values = {**json.loads(file.read_text()), "eos_token_id": [7, 9]}
  del values["torch_dtype"]
  file.write_text(json.dumps({**values, "dtype": "float32"}))
  (tmp_path / "source" / "chat_template.jinja").write_text("{{ messages }}")
  export(params, model, tmp_path / "source", tmp_path / "out", "bfloat16")
  written = json.loads((tmp_path / "out" / "config.json").read_text())
  assert written == {**values, "dtype": "bfloat16"}
  template = tmp_path / "out" / "chat_template.jinja"
  assert template.read_text() == "{{ messages }}"


def test_bad_requests_are_refused_and_leave_nothing(tmp_path):
  model, params = tiny.model("llama"), tiny.params("llama")
  with pytest.raises(InputError, match="float32, bfloat16, got 'float8'"):
    export(params, model, None, tmp_path / "out", "float8")
  other = tiny.model("qwen2")
  export(tiny.params("qwen2"), other, None, tmp_path / "other")
  with pytest.raises(InputError, match="another model"):
    export(params, model, tmp_path / "other", tmp_path / "out")
  with pytest.raises(InputError, match="not an empty folder"):
    export(params, model, None, tmp_path / "other")
  assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_half_written_export_of_a_killed_run_is_replaced(tmp_path):
  model, params = tiny.model("llama"), tiny.params("llama")
  (tmp_path / ".out.partial").mkdir()
  (tmp_path / ".out.partial" / "rubbish").touch()
  (tmp_path / "out").mkdir()
  export(params, model, None, tmp_path / "out")
  assert {file.name for file in (tmp_path / "out").iterdir()} == {
    "config.json",
    "model.safetensors",
  }
