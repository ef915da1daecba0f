"""Architectures without weights, by the sizes that their authors state."""

import json

import pytest

from opd_jax.errors import InputError
from opd_jax.models import hf, published

# Parameters of the published files, tied embeddings once.
COUNTS = {
  "Qwen/Qwen3-0.6B": 596_049_920,
  "Qwen/Qwen3-1.7B": 1_720_574_976,
  "Qwen/Qwen3-4B": 4_022_468_096,
  "Qwen/Qwen3-8B": 8_190_735_360,
  "Qwen/Qwen3-14B": 14_768_307_200,
  "Qwen/Qwen3-32B": 32_762_123_264,
  "Qwen/Qwen3-30B-A3B": 30_532_122_624,
  "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
  "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
  "Qwen/Qwen2.5-32B-Instruct": 32_763_876_352,
  "meta-llama/Llama-3.1-8B": 8_030_261_248,
  "meta-llama/Llama-3.1-70B": 70_553_706_496,
  "meta-llama/Llama-3.2-1B": 1_235_814_400,
  "google/gemma-2-2b": 2_614_341_888,
  "google/gemma-2-9b": 9_241_705_984,
  "google/gemma-2-27b": 27_227_128_320,
  "google/gemma-3-1b-pt": 999_885_952,
}


@pytest.mark.parametrize("name", published.PUBLISHED)
def test_parameters_are_those_of_the_published_files(name):
  base = name.removesuffix("-it")
  base = base if base in COUNTS else base.removesuffix("-Instruct")
  if name == "google/gemma-3-1b-it":
    base = "google/gemma-3-1b-pt"
  count = COUNTS.get(name) or COUNTS[base]
  assert hf.parameter_count(published.architecture(name)) == count


def test_a_file_at_hand_goes_first(tmp_path):
  values = {**published.PUBLISHED["Qwen/Qwen3-8B"], "num_hidden_layers": 2}
  (tmp_path / "config.json").write_text(json.dumps(values))
  assert published.architecture(str(tmp_path)).num_layers == 2


def test_an_unknown_model_says_what_to_download():
  with pytest.raises(InputError, match=r"hf download acme/model config\.json"):
    published.architecture("acme/model")
  # A revision may be of another size.
  with pytest.raises(InputError, match="Qwen3-8B"):
    published.architecture("Qwen/Qwen3-8B@v2")
