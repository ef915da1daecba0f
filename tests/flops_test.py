"""Operations counted by hand."""

import dataclasses

import pytest

from opd_jax import flops
from opd_jax.models import Experts
from tests.models import tiny

LLAMA = tiny.CONFIGS["llama"]


def test_a_dense_model_by_hand():
  # D 20, N 4, M 2, H 6, F 28, L 3, V 105.
  weights = 20 * (2 * 24 + 2 * 12 + 3 * 28)
  attention = 2 * 4 * 6 * 10  # Scores and values: 2 N H each of 10 tokens.
  layer = 2 * weights + 2 * attention
  assert flops.forward(LLAMA, 7, 10, 5) == 7 * 3 * layer + 5 * 2 * 20 * 105


def test_experts_count_that_a_token_runs_through():
  experts = Experts(count=6, per_token=2, size=14, renormalize=True)
  sparse = dataclasses.replace(LLAMA, experts=experts)
  router = 3 * 2 * 20 * 6
  assert flops.forward(sparse, 7, 10, 5) == (
    flops.forward(LLAMA, 7, 10, 5) + 7 * router
  )


@pytest.mark.parametrize(("context", "seen"), [(2, 2), (10, 4)])
def test_local_layers_attend_to_their_window(context, seen):
  local = dataclasses.replace(LLAMA, window=4, local_layers=(True, True, False))
  less = 2 * (4 * 24 * (context - seen))
  assert flops.forward(local, 7, context, 5) == (
    flops.forward(LLAMA, 7, context, 5) - 7 * less
  )
