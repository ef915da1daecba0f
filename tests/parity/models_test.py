"""Every family against transformers, both ways; odd sizes, ragged rows."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.errors import InputError
from opd_jax.export import export
from opd_jax.models import Model, hf
from tests.models import tiny

torch = pytest.importorskip("torch", reason="torch is an extra: parity")
transformers = pytest.importorskip(
  "transformers", reason="transformers is needed for parity"
)
pytestmark = pytest.mark.parity

TOLERANCE = 1e-4

LLAMA = {
  "vocab_size": 105,
  "hidden_size": 24,
  "intermediate_size": 28,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 10,
  "max_position_embeddings": 64,
  "pad_token_id": 0,
}
LLAMA3 = {
  "rope_type": "llama3",
  "rope_theta": 500.0,
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 16,
}
YARN = {
  "rope_type": "yarn",
  "rope_theta": 1000.0,
  "factor": 4.0,
  "original_max_position_embeddings": 16,
}
GEMMA = {
  **LLAMA,
  "num_hidden_layers": 4,
  "query_pre_attn_scalar": 12,
  "sliding_window": 7,
  "rms_norm_eps": 1e-5,
}
MOE = {
  **LLAMA,
  "moe_intermediate_size": 12,
  "num_experts": 6,
  "num_experts_per_tok": 2,
}
# name: class of transformers' config, its fields.
CASES = {
  "llama": ("LlamaConfig", LLAMA),
  "llama tied": ("LlamaConfig", {**LLAMA, "tie_word_embeddings": True}),
  "llama3": (
    "LlamaConfig",
    {
      **LLAMA,
      "rope_parameters": LLAMA3,
      "attention_bias": True,
      "mlp_bias": True,
      "num_key_value_heads": 1,
    },
  ),
  "llama linear": (
    "LlamaConfig",
    {
      **LLAMA,
      "rope_parameters": {
        "rope_type": "linear",
        "rope_theta": 100.0,
        "factor": 2.5,
      },
    },
  ),
  "mistral": ("MistralConfig", {**LLAMA, "sliding_window": None}),
  "mistral local": ("MistralConfig", {**LLAMA, "sliding_window": 7}),
  "qwen3_moe": ("Qwen3MoeConfig", MOE),
  "qwen3_moe renormalised": (
    "Qwen3MoeConfig",
    {
      **MOE,
      "num_experts": 7,
      "num_experts_per_tok": 3,
      "norm_topk_prob": True,
      "attention_bias": True,
      "rope_parameters": YARN,
      "tie_word_embeddings": True,
    },
  ),
  "gemma2": (
    "Gemma2Config",
    {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
  ),
  "gemma2 without caps": (
    "Gemma2Config",
    {
      **GEMMA,
      "attn_logit_softcapping": None,
      "final_logit_softcapping": None,
      "attention_bias": True,
      "layer_types": ["full_attention"] * 3 + ["sliding_attention"],
      "tie_word_embeddings": False,
    },
  ),
  "gemma3": ("Gemma3TextConfig", GEMMA),
  "gemma3 scaled": (
    "Gemma3TextConfig",
    {
      **GEMMA,
      "final_logit_softcapping": 3.0,
      "num_hidden_layers": 5,
      "layer_types": ["sliding_attention", "full_attention"] * 2
      + ["sliding_attention"],
      "rope_parameters": {
        "full_attention": {
          "rope_type": "linear",
          "rope_theta": 500.0,
          "factor": 4.0,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
      },
    },
  ),
  "qwen2": (
    "Qwen2Config",
    {
      **LLAMA,
      "head_dim": 6,
      "num_key_value_heads": 4,
      "tie_word_embeddings": True,
      "rms_norm_eps": 1e-5,
    },
  ),
  "qwen2 yarn": (
    "Qwen2Config",
    {**LLAMA, "head_dim": 16, "rope_parameters": YARN},
  ),
  "qwen2 yarn options": (
    "Qwen2Config",
    {
      **LLAMA,
      "head_dim": 16,
      "rope_parameters": {
        **YARN,
        "attention_factor": 1.3,
        "beta_fast": 4.0,
        "beta_slow": 0.5,
        "truncate": False,
      },
    },
  ),
  "qwen3": ("Qwen3Config", LLAMA),
  "qwen3 tied, biases": (
    "Qwen3Config",
    {**LLAMA, "tie_word_embeddings": True, "attention_bias": True},
  ),
}


@pytest.fixture(autouse=True)
def quiet():
  transformers.utils.logging.set_verbosity_error()
  transformers.utils.logging.disable_progress_bar()


def _torch_model(case):
  kind, fields = CASES[case]
  torch.manual_seed(0)
  config = getattr(transformers, kind)(**fields)
  model = transformers.AutoModelForCausalLM.from_config(config).eval()
  neutral = 0.0 if kind.startswith("Gemma") else 1.0
  with torch.no_grad():
    for name, weight in model.named_parameters():
      centre = neutral if name.endswith("norm.weight") else 0.0
      weight.copy_(centre + 0.3 * torch.randn_like(weight))
  return model


def _batch(vocab_size):
  """Left-padded rows, the longest far beyond the original rope windows."""
  random = np.random.default_rng(0)
  lengths, slots = (40, 1, 17, 33), 40
  tokens = random.integers(0, vocab_size, (len(lengths), slots))
  positions = np.arange(slots) - (slots - np.array(lengths))[:, None]
  return tokens, np.maximum(positions, -1)


def _torch_logits(model, tokens, positions):
  with torch.no_grad():
    return (
      model(
        input_ids=torch.from_numpy(tokens),
        attention_mask=torch.from_numpy((positions >= 0).astype(np.int64)),
        position_ids=torch.from_numpy(np.maximum(positions, 0)),
        use_cache=False,
      )
      .logits.float()
      .numpy()
    )


def _our_logits(model, params, tokens, positions):
  @jax.jit
  def logits(params, tokens, positions):
    return model.logits(params, model.hidden(params, tokens, positions))

  return np.asarray(logits(params, jnp.asarray(tokens), jnp.asarray(positions)))


def _assert_same_logits(ours, theirs, positions):
  live = positions >= 0
  np.testing.assert_allclose(
    ours[..., : theirs.shape[-1]][live], theirs[live], atol=TOLERANCE
  )


@pytest.mark.parametrize("case", CASES)
def test_transformers_to_us_and_back(case, tmp_path):
  theirs = _torch_model(case)
  theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
  tokens, positions = _batch(105)
  want = _torch_logits(theirs, tokens, positions)
  assert np.abs(want).max() > 1.0
  model = Model(hf.read_config(tmp_path / "theirs"), tiny.layout())
  params = hf.load(tmp_path / "theirs", model)
  ours = _our_logits(model, params, tokens, positions)
  _assert_same_logits(ours, want, positions)
  export(params, model, tmp_path / "theirs", tmp_path / "ours")
  back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
  np.testing.assert_array_equal(
    _torch_logits(back.eval(), tokens, positions), want
  )


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_our_weights_and_config_in_transformers(name, tmp_path):
  model, params = tiny.model(name), tiny.params(name)
  export(params, model, None, tmp_path / "ours")
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
  tokens, positions = _batch(model.config.vocab_size)
  _assert_same_logits(
    _our_logits(model, params, tokens, positions),
    _torch_logits(theirs.eval(), tokens, positions),
    positions,
  )


def test_the_text_model_of_a_multimodal_gemma(tmp_path):
  """As docs/models.md says to write it."""
  vision = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
  }
  config = transformers.Gemma3Config(
    text_config={**GEMMA, "query_pre_attn_scalar": 12},
    vision_config=vision,
    mm_tokens_per_image=1,
    image_token_index=104,
  )
  transformers.Gemma3ForConditionalGeneration(config).save_pretrained(
    tmp_path / "whole"
  )
  with pytest.raises(InputError, match="text model alone"):
    hf.read_config(tmp_path / "whole")
  whole = transformers.AutoModelForImageTextToText.from_pretrained(
    tmp_path / "whole"
  )
  text = transformers.Gemma3ForCausalLM(whole.config.text_config)
  text.model.load_state_dict(whole.model.language_model.state_dict())
  text.save_pretrained(tmp_path / "text")
  tokens, positions = _batch(104)
  model = Model(hf.read_config(tmp_path / "text"), tiny.layout())
  ours = _our_logits(
    model, hf.load(tmp_path / "text", model), tokens, positions
  )
  want = _torch_logits(whole.eval(), tokens, positions)
  assert np.abs(want).max() > 0.1
  _assert_same_logits(ours, want, positions)


def test_bfloat16_files_both_ways(tmp_path):
  theirs = _torch_model("qwen3").to(torch.bfloat16)
  theirs.save_pretrained(tmp_path / "theirs")
  widened = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "theirs", dtype=torch.float32
  )
  model = Model(hf.read_config(tmp_path / "theirs"), tiny.layout())
  params = hf.load(tmp_path / "theirs", model)
  tokens, positions = _batch(105)
  _assert_same_logits(
    _our_logits(model, params, tokens, positions),
    _torch_logits(widened.eval(), tokens, positions),
    positions,
  )
  export(params, model, tmp_path / "theirs", tmp_path / "ours", "bfloat16")
  config = json.loads((tmp_path / "ours" / "config.json").read_text())
  assert config["dtype"] == "bfloat16"
  back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
  assert back.dtype == torch.bfloat16
  for name, weight in theirs.state_dict().items():
    torch.testing.assert_close(back.state_dict()[name], weight, rtol=0, atol=0)
