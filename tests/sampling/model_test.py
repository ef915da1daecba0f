"""The sampler on real models: reference ids, mismatch, many devices."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import sequences, sharding
from opd_jax.config import SamplingConfig
from opd_jax.models import Model, ModelConfig, hf
from opd_jax.sampling import draw, sample
from opd_jax.types import PromptBatch

pytestmark = pytest.mark.loose_promotion


def layout(devices, **sizes):
  mesh = sharding.make_mesh(sizes, devices)
  return sharding.Layout.create(mesh, sharding.DECODE_RULES)


@pytest.fixture(scope="module")
def stories(shared_data):
  """A trained model of 260,000 weights, its weights and its references."""
  folder = shared_data / "models/stories260K"
  model = Model(hf.read_config(folder), layout(jax.devices()[:1]))
  reference = json.loads((folder / "reference.json").read_text())
  return model, hf.load(folder, model), reference["greedy"]


def batch(prompts):
  slots = max(len(prompt) for prompt in prompts)
  return PromptBatch(
    tokens=jnp.array([p + [0] * (slots - len(p)) for p in prompts], jnp.int32),
    lengths=jnp.array([len(p) for p in prompts], jnp.int32),
  )


def run(model, params, prompts, **arguments):
  return jax.jit(
    lambda params, prompts, key: sample(
      model, params, prompts, key=key, **arguments
    )
  )(params, prompts, jax.random.key(0))


@jax.jit(static_argnames=("model", "vocab_size"))
def student_logprobs(model, params, rollout, vocab_size):
  """Log-probabilities [B, T] by one forward pass over whole rows."""
  tokens, positions = sequences.join(
    rollout.prompts, rollout.tokens, rollout.sampled_mask.sum(axis=1)
  )
  hidden = model.hidden(params, tokens, positions)
  hidden = hidden[:, rollout.prompts.tokens.shape[1] - 1 : -1]
  scores = jax.nn.log_softmax(model.logits(params, hidden)[..., :vocab_size])
  return jnp.take_along_axis(scores, rollout.tokens[:, :, None], axis=2)[..., 0]


def test_greedy_gives_the_reference_ids(stories):
  model, params, greedy = stories
  length = max(len(case["completion_ids"]) for case in greedy)
  rollout = run(
    model,
    params,
    batch([case["prompt_ids"] for case in greedy]),
    config=SamplingConfig(max_new_tokens=length, temperature=0.0),
    stop_ids=(),
    rollouts=1,
    vocab_size=model.config.vocab_size,
  )
  for row, case in enumerate(greedy):
    count = len(case["completion_ids"])
    assert rollout.tokens[row, :count].tolist() == case["completion_ids"]
    np.testing.assert_allclose(
      rollout.behavior_logprobs[row, :count], case["logprobs"], atol=1e-4
    )


def test_behavior_equals_the_student(stories):
  model, params, greedy = stories
  rollout = run(
    model,
    params,
    batch([[1], *(case["prompt_ids"] for case in greedy[:2])]),
    config=SamplingConfig(max_new_tokens=100),
    stop_ids=(1, 426),
    rollouts=3,
    vocab_size=model.config.vocab_size,
  )
  mask = np.asarray(rollout.sampled_mask)
  assert not mask.all()
  student = student_logprobs(model, params, rollout, model.config.vocab_size)
  mismatch = np.abs(rollout.behavior_logprobs - student)[mask]
  # Decode and forward round differently: the logits reach 21, whose unit in
  # the last place is 2e-6.
  assert mismatch.max() < 2e-5
  assert mismatch.mean() < 2e-6


def test_eight_devices_draw_the_tokens_of_one():
  config = ModelConfig.from_hf(
    {
      "model_type": "qwen3",
      "vocab_size": 300,
      "hidden_size": 32,
      "intermediate_size": 64,
      "num_hidden_layers": 2,
      "num_attention_heads": 4,
      "num_key_value_heads": 2,
      "head_dim": 8,
    }
  )
  prompts = batch([[5], [7, 8, 9], [1, 2, 3, 4], [299, 0]])

  def rollout_on(place):
    model = Model(config, place)
    params = model.init(jax.random.key(0))
    placed = jax.tree.map(
      lambda leaf: jax.device_put(
        leaf, place.sharding(("batch", *[None] * (leaf.ndim - 1)))
      ),
      prompts,
    )
    program = (
      jax.jit(
        lambda params, prompts: sample(
          model,
          params,
          prompts,
          config=SamplingConfig(max_new_tokens=8),
          stop_ids=(7,),
          rollouts=2,
          key=jax.random.key(1),
          vocab_size=290,
        )
      )
      .lower(params, placed)
      .compile()
    )
    return model, params, program(params, placed), program.as_text()

  model, params, alone, _ = rollout_on(layout(jax.devices()[:1]))
  _, _, spread, text = rollout_on(layout(None, replica=2, fsdp=2, tensor=2))
  np.testing.assert_array_equal(spread.tokens, alone.tokens)
  np.testing.assert_array_equal(spread.stop_reason, alone.stop_reason)
  np.testing.assert_allclose(
    spread.behavior_logprobs, alone.behavior_logprobs, atol=1e-5
  )
  np.testing.assert_allclose(
    alone.behavior_logprobs,
    alone.sampled_mask * student_logprobs(model, params, alone, 290),
    atol=1e-5,
  )
  assert spread.tokens.sharding.is_equivalent_to(
    spread.prompts.tokens.sharding, 2
  )
  # Neither weights nor logits are gathered: only the masses of the draw are.
  gathered = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", text)
  assert set(gathered) == {f"2,{draw.BLOCKS}"}
