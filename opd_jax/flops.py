"""Floating-point operations of a step.

A product of [n, k] and [k, m] counts 2 n k m; a backward pass counts twice its
forward, or once where only adapters are trained, which count nothing. What is
computed again, by rematerialisation or in the pass before an update, is not
counted, so that the utilisation (MFU) is about useful work.
"""

from opd_jax.models import ModelConfig

# Forward passes that a backward one counts for, by whether only adapters are
# trained.
BACKWARD = {False: 2, True: 1}


def forward(
  config: ModelConfig, tokens: float, context: float, predicted: float
) -> float:
  """Operations of a forward pass.

  Of experts those count that a token runs through.

  Args:
    config: of the model.
    tokens: run through the blocks.
    context: tokens each of them attends to, on average; local layers no more
      than their window.
    predicted: tokens whose next-token logits are computed.
  """
  heads = config.num_heads * config.head_size
  kv_heads = config.num_kv_heads * config.head_size
  inner = 3 * config.intermediate_size
  if config.experts is not None:
    experts = config.experts
    inner = 3 * experts.per_token * experts.size + experts.count
  weights = config.hidden_size * (2 * heads + 2 * kv_heads + inner)
  seen = sum(
    min(context, config.window or context) if local else context
    for local in config.is_local
  )
  per_token = config.num_layers * 2 * weights + 4 * heads * seen
  head = 2 * config.hidden_size * config.vocab_size
  return tokens * per_token + predicted * head


def step(
  student: ModelConfig,
  frozen: tuple[ModelConfig, ...],
  *,
  prompts: int,
  rows: int,
  prompt_length: float,
  completion_length: float,
  given_length: float = 0.0,
  prefixes: bool = False,
  frozen_prompt_length: float | None = None,
  reference: ModelConfig | None = None,
  mixed: ModelConfig | None = None,
  epochs: int = 1,
  start: bool = False,
  kept: float = 1.0,
  frozen_kept: float = 1.0,
  adapters: bool = False,
) -> float:
  """Operations of one step on real (not padded) tokens.

  Args:
    student: sampled from, and trained.
    frozen: models that score every row.
    prompts: that are prefilled.
    rows: completions.
    prompt_length: tokens per prompt, on average.
    completion_length: tokens per completion, on average.
    given_length: of them those that are stored or replayed, not drawn.
    prefixes: whether rows are prefilled, each with what is given of it; if not,
      prompts are, and a row is drawn or given as a whole.
    frozen_prompt_length: tokens per prompt that frozen models read; None for
      the student's.
    reference: a model that scores every row after the student's prompts.
    mixed: a model that is drawn from beside the student.
    epochs: passes over the rows, each with an update of its own.
    start: the student scores every row once more before the first of them.
    kept: fraction of the tokens that carry loss.
    frozen_kept: fraction whose next-token logits frozen models compute; that of
      the reference is `kept`.
    adapters: of the student are trained, in place of its weights.
  """
  tokens = rows * completion_length
  drawn = tokens - rows * given_length

  def draw(config: ModelConfig) -> float:
    filled, start, drawn_in_row = prompts, prompt_length, completion_length
    if prefixes:
      filled, start = rows, prompt_length + given_length
      drawn_in_row = completion_length - given_length
    prefill = forward(config, filled * start, start / 2, filled)
    return prefill + forward(config, drawn, start + drawn_in_row / 2, drawn)

  def score(config: ModelConfig, before: float, share: float = 1.0) -> float:
    length = before + completion_length
    return forward(config, rows * length, length / 2, share * tokens)

  if frozen_prompt_length is None:
    frozen_prompt_length = prompt_length
  scores = [
    score(config, frozen_prompt_length, frozen_kept) for config in frozen
  ]
  if reference is not None:
    scores.append(score(reference, prompt_length, kept))
  own = score(student, prompt_length)
  backwards = BACKWARD[adapters] * score(student, prompt_length, kept)
  drawing = draw(student) + (draw(mixed) if mixed is not None else 0.0)
  return drawing + start * own + epochs * (own + backwards + sum(scores))


def supervised(
  student: ModelConfig,
  *,
  tokens: float,
  context: float,
  learned: float,
  adapters: bool = False,
) -> float:
  """Operations of one supervised step on real (not padded) tokens.

  Args:
    student: that is trained.
    tokens: in all rows.
    context: tokens each of them attends to, on average.
    learned: tokens that carry loss.
    adapters: of the student are trained, in place of its weights.
  """
  passes = 1 + BACKWARD[adapters]
  return passes * forward(student, tokens, context, learned)
