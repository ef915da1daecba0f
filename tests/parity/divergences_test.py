"""The divergences against torch and the formula that TRL publishes.

TRL is not a dependency. Its formula is written out here from
`GKDTrainer.generalized_jsd_loss` of `trl/experimental/gkd/gkd_trainer.py`, as
of commit 054a0dab of huggingface/trl: with b = beta, in terms of torch's
`kl_div(log q, log p, log_target=True)` = p (log p - log q),

  b kl_div(m, teacher) + (1 - b) kl_div(m, student)
  m = logsumexp(student + log1p(-b), teacher + log b)

and the two KLs at b = 0 and 1; masked, and divided by the number of labels.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import objectives
from opd_jax.objectives.divergences import Divergence
from tests.objectives import support

torch = pytest.importorskip("torch", reason="compares with torch")
pytestmark = pytest.mark.parity

ROWS, LENGTH, VOCAB = 3, 7, 211


def published_jsd(student, teacher, mask, beta, temperature):
  """The batch's loss by TRL's formula, of torch logits."""
  student, teacher = (
    torch.log_softmax(logits / temperature, dim=-1)
    for logits in (student, teacher)
  )

  def kl_div(q, p):
    return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True)

  if beta == 0:
    columns = kl_div(student, teacher)
  elif beta == 1:
    columns = kl_div(teacher, student)
  else:
    weight = torch.tensor(beta, dtype=student.dtype)
    mixture = torch.logaddexp(
      student + torch.log1p(-weight), teacher + torch.log(weight)
    )
    columns = beta * kl_div(mixture, teacher) + (1 - beta) * kl_div(
      mixture, student
    )
  return columns[mask].sum() / mask.sum()


def _logits(scale):
  rng = np.random.default_rng(0)
  student, teacher = rng.normal(size=(2, ROWS, LENGTH, VOCAB)) * scale
  lengths = np.array([7, 4, 1])
  mask = np.arange(LENGTH)[None] < lengths[:, None]
  return student.astype(np.float32), teacher.astype(np.float32), mask


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("scale", "temperature"), [(1.0, 1.0), (5.0, 0.9)])
def test_generalized_jsd_is_that_of_trl(beta, scale, temperature):
  student, teacher, mask = _logits(scale)
  theirs = torch.tensor(student, requires_grad=True)
  expected = published_jsd(
    theirs, torch.tensor(teacher), torch.tensor(mask), beta, temperature
  )
  expected.backward()
  objective = objectives.create({"name": "gkd", "beta": beta})

  def ours(student):
    logits = {
      "student": student / temperature,
      "teacher": jnp.asarray(teacher) / temperature,
    }
    return support.loss_of(
      objective,
      logits,
      jnp.zeros((ROWS, LENGTH), jnp.int32),
      jnp.asarray(mask),
      jnp.zeros((ROWS, LENGTH)),
    )[0]

  found, gradient = jax.value_and_grad(ours)(jnp.asarray(student))
  np.testing.assert_allclose(found, expected.item(), rtol=1e-5)
  np.testing.assert_allclose(gradient, theirs.grad.numpy(), atol=1e-6)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jeffreys"])
def test_kls_are_those_of_torch(name):
  """`torch.distributions.kl_divergence` of categoricals, in float64."""
  student, teacher, _ = _logits(3.0)
  of = torch.distributions.Categorical
  s, t = (
    of(logits=torch.tensor(logits, dtype=torch.float64))
    for logits in (student, teacher)
  )
  kl = torch.distributions.kl_divergence
  expected = {
    "forward_kl": kl(t, s),
    "reverse_kl": kl(s, t),
    "jeffreys": kl(t, s) + kl(s, t),
  }[name]
  found = Divergence(name=name)(
    jax.nn.log_softmax(student, axis=-1), jax.nn.log_softmax(teacher, axis=-1)
  )
  np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)
