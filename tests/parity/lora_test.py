"""Adapters against peft, both ways, on random tiny models."""

import jax
import numpy as np
import pytest

from opd_jax.export import export, export_adapter
from opd_jax.models import Model, hf, lora, peft
from tests.lora_test import lora_of, spread
from tests.models import tiny
from tests.parity.models_test import (
  TOLERANCE,
  _assert_same_logits,
  _batch,
  _our_logits,
  _torch_logits,
)

torch = pytest.importorskip("torch", reason="torch is not installed")
theirs = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers")
pytestmark = [
  pytest.mark.parity,
  # peft reads a name that transformers has renamed.
  pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
  ),
]


def _pretrained(folder):
  load = transformers.AutoModelForCausalLM.from_pretrained
  return load(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "qwen3_moe"])
def test_merged_and_adapter_are_what_we_have(name, tmp_path):
  config, base = tiny.CONFIGS[name], tiny.params(name)
  model = Model(config, tiny.layout(), lora=lora_of(config))
  adapters = spread(model.abstract_trained(), 0, 0.2)
  whole = lora.combine(base, adapters)
  tokens, positions = _batch(config.vocab_size)
  ours = _our_logits(model, whole, tokens, positions)
  before = _our_logits(model, base, tokens, positions)
  assert np.abs(ours - before)[positions >= 0].max() > 0.5

  export(base, model, None, tmp_path / "base")
  export(whole, model, tmp_path / "base", tmp_path / "merged")
  merged = _pretrained(tmp_path / "merged")
  _assert_same_logits(ours, _torch_logits(merged, tokens, positions), positions)
  export_adapter(adapters, model, tmp_path / "base", tmp_path / "adapter")
  loaded = theirs.PeftModel.from_pretrained(
    _pretrained(tmp_path / "base"), tmp_path / "adapter"
  ).eval()
  _assert_same_logits(ours, _torch_logits(loaded, tokens, positions), positions)
  with loaded.disable_adapter():
    off = _torch_logits(loaded, tokens, positions)
  _assert_same_logits(before, off, positions)


def test_an_adapter_of_peft_is_read(tmp_path):
  config, base = tiny.CONFIGS["qwen3"], tiny.params("qwen3")
  export(base, tiny.model("qwen3"), None, tmp_path / "base")
  torch.manual_seed(0)
  written = theirs.get_peft_model(
    _pretrained(tmp_path / "base"),
    theirs.LoraConfig(
      r=5,
      lora_alpha=7,
      target_modules=["v_proj", "up_proj", "o_proj"],
      init_lora_weights=False,
      task_type="CAUSAL_LM",
    ),
  ).eval()
  written.save_pretrained(tmp_path / "adapter")
  assert peft.read_base(tmp_path / "adapter") == str(tmp_path / "base")
  found = peft.read_lora(tmp_path / "adapter", config)
  assert found.targets == ("v_proj", "o_proj", "up_proj")
  model = Model(hf.read_config(tmp_path / "base"), tiny.layout(), lora=found)
  whole = lora.combine(base, peft.load(tmp_path / "adapter", model))
  tokens, positions = _batch(config.vocab_size)
  want = _torch_logits(written, tokens, positions)
  ours = _our_logits(model, whole, tokens, positions)
  _assert_same_logits(ours, want, positions)
  merged = jax.jit(model.working_copy)(whole)
  ours = _our_logits(model, merged, tokens, positions)
  _assert_same_logits(ours, want, positions)
  plain = _our_logits(model, base, tokens, positions)
  assert np.abs(plain[..., :105] - want)[positions >= 0].max() > TOLERANCE
