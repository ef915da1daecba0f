"""What the study runs: the objectives of the table, controls, teachers.

An entry is a config file with some keys changed, and the seeds to run it with.
A new objective is one line in `TABLE`. A value "@NAME" is what the entry NAME
left: the student of a run, or the file of completions; see `runs.output`.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

REPO = Path(__file__).resolve().parents[2]

SEEDS = (0, 1, 2)
# What is compared in pairs gets more.
PAIRED_SEEDS = (0, 1, 2, 3, 4)
# Of teachers and files: none of the seeds of what is compared.
MAKER_SEED = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
  """A run but for its seed.

  Attributes:
    name: unique.
    values: of config keys, by dotted name; they replace those of the file.
    command: of `opd-jax`; "eval" only evaluates `values["student.path"]`, and
      "generate" has that model complete the problems of training. "texts" is
      none: it writes solved problems that are held out.
    config: the file, relative to the repository.
    seeds: of the runs. A seed rules data order and draws; the initial weights
      and the problems of the evaluation are always the same.
    levels: of the problems of each evaluation, by its name; none for a run on
      another task, of which only the log is looked at.
    note: for the table.
  """

  name: str
  values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  command: Literal["train", "sft", "eval", "generate", "texts"] = "train"
  config: str = "configs/quickstart.py"
  seeds: Sequence[int] = SEEDS
  levels: Mapping[str, Sequence[int]] = dataclasses.field(
    default_factory=lambda: {"test": (3, 4, 5)}
  )
  note: str = ""

  def needs(self) -> set[str]:
    """Entries whose output this one reads."""
    return {value[1:] for value in _strings(self.values) if value[:1] == "@"}


def _strings(value: Any) -> Iterator[str]:
  if isinstance(value, str):
    yield value
  elif isinstance(value, Mapping):
    for part in value.values():
      yield from _strings(part)


def objective(name: str, **options: Any) -> dict[str, Any]:
  """The group `objective` as a whole."""
  return {"objective": {"name": name, **options}}


BOTH = {"short": (3,), "long": (5,), "test": (3, 4, 5)}


def only(*levels: int) -> dict[str, Any]:
  """Training problems of these levels only."""
  return {"data.sources.arith.options": {"levels": levels}}


# --- As they come: the two ends of the scale. ---
ENDS = (
  Entry(
    name="student",
    command="eval",
    values={"student.path": "checkpoints/arith_student"},
    seeds=(MAKER_SEED,),
    levels=BOTH,
    note="as shipped",
  ),
  Entry(
    name="teacher",
    command="eval",
    values={"student.path": "checkpoints/arith_teacher"},
    seeds=(MAKER_SEED,),
    levels=BOTH,
    note="as shipped",
  ),
)

GRPO = objective("grpo") | {
  "batch.prompts": 16,
  "batch.rollouts": 4,
  "reward": {"verifier": "number"},
  "optimizer.learning_rate": 5e-4,
}

# --- What other entries learn from. ---
MAKERS = (
  Entry(
    name="teacher_samples",
    command="generate",
    values={"student.path": "checkpoints/arith_teacher"},
    seeds=(MAKER_SEED,),
  ),
  Entry(name="held_out", command="texts", seeds=(MAKER_SEED,)),
  Entry(
    name="tuned",
    values={"steps": 20},
    seeds=(MAKER_SEED,),
    note="a teacher with headroom: the student after 20 steps of gkd",
  ),
  Entry(
    name="rewarded",
    values=GRPO,
    seeds=(MAKER_SEED,),
    note="a teacher as the paper's: the student after 100 steps of grpo",
  ),
  Entry(
    name="rewarded_short",
    values=GRPO | only(3),
    seeds=(MAKER_SEED,),
    levels=BOTH,
    note="the same on problems of level 3",
  ),
  Entry(
    name="rewarded_long",
    values=GRPO | only(5),
    seeds=(MAKER_SEED,),
    levels=BOTH,
    note="the same on problems of level 5",
  ),
)

# Completions of the teacher beside the prompts that are drawn for; a store is
# what `generate` writes as Parquet.
STORED = {
  "data.sources.stored": {
    "path": "@teacher_samples",
    "given": True,
    "prompt": {"text": "{question}"},
  }
}

# The vocabulary has 20 ids, so the papers' K = 16 and 64 become 4.
K = 4
REFERENCE = {"reference": {"path": "checkpoints/arith_student"}}


def extrapolated(lam: float) -> dict[str, Any]:
  """gopd, with the student as shipped as reference; lam 1 needs none."""
  if lam == 1:
    return objective("gopd")
  return objective("gopd", lam=lam) | REFERENCE


TABLE = (
  Entry(
    name="gkd",
    values=objective("gkd", beta=1.0),
    seeds=PAIRED_SEEDS,
    note="reverse KL",
  ),
  Entry(
    name="gkd_forward",
    values=objective("gkd", beta=0.0),
    note="forward KL",
  ),
  Entry(
    name="gkd_jsd",
    values=objective("gkd", beta=0.5),
    note="JSD, beta 0.5",
  ),
  Entry(
    name="distillm",
    values=objective("distillm"),
    note="skewed forward KL, alpha 0.1, without replay",
  ),
  Entry(name="opd_k1", values=objective("opd_k1"), seeds=PAIRED_SEEDS),
  Entry(name="opd_k2", values=objective("opd_k2")),
  Entry(
    name="eopd",
    values=objective("eopd", top_k=K),
    note="the teacher is never as unsure as the threshold, 0.8 nats, so that "
    "no forward KL is added: clipped opd_k1",
  ),
  Entry(
    name="reopold",
    values=objective("reopold"),
    seeds=PAIRED_SEEDS,
    note="two stages, lam 0.1; from step 50 on only the fifth of the tokens "
    "with the highest entropy carries loss",
  ),
  Entry(
    name="gopd",
    values=extrapolated(0.5),
    note="lam 0.5: half way from reference to teacher, in log-probability",
  ),
  Entry(
    name="exopd",
    values=objective("exopd") | REFERENCE,
    note="lam 1.25",
  ),
  Entry(
    name="tropd",
    values=objective("tropd", top_k=K),
    seeds=PAIRED_SEEDS,
    note=f"K {K}, without prefixes; an outlier's forward KL counts only as "
    "often as the models disagree, so that its pull fades sooner than the gap",
  ),
  Entry(
    name="aopd",
    values=objective("aopd", top_k=K),
    note=f"K {K}",
  ),
  Entry(
    name="gkd_stored",
    values=objective("gkd", beta=1.0)
    | STORED
    | {"rollout": {"stored_fraction": 0.5}},
    note="reverse KL, half of the completions the teacher's (lambda 0.5)",
  ),
  Entry(
    name="distillm_replay",
    values=objective("distillm")
    | STORED
    | {
      "rollout": {"replay_capacity": 1024, "replay_threshold": 0.5},
      "held_out": {"path": "@held_out", "every": 10},
    },
    note="with replay of 1,024 completions, threshold 0.5 at the start",
  ),
  Entry(
    name="tropd_prefix",
    values=objective("tropd", top_k=K, guidance=0.001)
    | STORED
    | {"rollout": {"prefix": "cosine"}},
    note=f"K {K}, with prefixes of the teacher",
  ),
  Entry(
    name="minillm",
    values=objective("minillm") | {"rollout": {"teacher_mix": 0.2}},
    note="drawn from a mixture with the teacher, 0.2",
  ),
  Entry(
    name="tip",
    values=objective("gkd", beta=1.0)
    | {"selection": {"name": "soft_or", "fraction": 0.5}},
    seeds=PAIRED_SEEDS,
    note="reverse KL on half of the tokens, by Soft-OR",
  ),
  Entry(
    name="grpo",
    values=GRPO,
    note="control: right or wrong as reward, no teacher; 16 prompts of 4 "
    "rollouts, learning rate 5e-4, near the best of six that were tried with "
    "seed 0 on these problems (2e-3 destroys the student)",
  ),
  Entry(
    name="constant_negative_advantage",
    values=objective("constant_negative_advantage"),
    note="control: no teacher; the student forgets to stop, since with a mean "
    "over the batch's tokens those of long rows are pushed down less",
  ),
  Entry(
    name="sft",
    command="sft",
    config="configs/arith_sft.py",
    values={
      "data.sources.teacher.path": "@teacher_samples",
      "optimizer.learning_rate": 2e-3,
    },
    note="control: on 6,400 completions of the teacher",
  ),
)


# A pair whose teacher is unsure, as one of open text is; needs its models.
STORIES = "configs/tinystories_babyllama.py"
# Rows of level 3 from one teacher, rows of level 5 from the other.
MERGE = {
  "teacher": {"path": "@rewarded_short"},
  "domain_teachers": {"long": {"path": "@rewarded_long"}},
  "data.sources": {
    name: {
      "path": "arith",
      "options": {"levels": levels},
      "prompt": {"text": "{question}"},
    }
    for name, levels in {"short": (3,), "long": (5,)}.items()
  },
}
PAIRED = (
  Entry(
    name="reopold_clip",
    values=objective("reopold", variant="clip_only"),
    seeds=PAIRED_SEEDS,
  ),
  Entry(
    name="stories_opd_k1",
    config=STORIES,
    values=objective("opd_k1") | {"steps": 60},
    levels={},
  ),
  Entry(
    name="stories_reopold_clip",
    config=STORIES,
    values=objective("reopold", variant="clip_only") | {"steps": 60},
    levels={},
  ),
  *(
    Entry(
      name=f"{teacher}_gopd_{lam:g}",
      values=extrapolated(lam) | {"teacher": {"path": f"@{teacher}"}},
      seeds=PAIRED_SEEDS,
      note=f"lam {lam:g}",
    )
    for teacher in ("tuned", "rewarded")
    for lam in (1.0, 1.25, 1.5)
  ),
)

MERGES = tuple(
  Entry(
    name=f"merged_{lam:g}",
    values=extrapolated(lam) | MERGE,
    levels=BOTH,
    note=f"two domain teachers, lam {lam:g}",
  )
  for lam in (1.0, 1.25)
)

ENTRIES = {
  entry.name: entry for entry in (*ENDS, *MAKERS, *TABLE, *PAIRED, *MERGES)
}
