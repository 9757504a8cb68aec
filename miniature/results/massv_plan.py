"""Which drafters the README's figures come from, and what is compared with what."""

import dataclasses
from typing import Any

SEEDS = (0, 1, 2)
# Family (section of the report) -> variant of the configs.
FAMILIES = {"qwen2_5_vl": "mini", "gemma3": "mini_gemma"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """How much is trained and measured.

    Attributes:
      phase1, phase2: optimizer steps.
      train, heldout: scenes of the instruction set.
      answers: instructions that the target answers.
      prompts: held-out questions of each task.
      timed: of them, those whose answers are timed.
    """

    phase1: int
    phase2: int
    train: int
    heldout: int
    answers: int
    prompts: int
    timed: int


BUDGETS = {
    "full": Budget(
        phase1=200, phase2=300, train=6000, heldout=300, answers=4000, prompts=100, timed=20
    ),
    "smoke": Budget(phase1=2, phase2=2, train=24, heldout=4, answers=16, prompts=2, timed=1),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers:
    """Answers of the target.

    Attributes:
      name: its folder.
      share: of the budget's instructions.
      values: further config values.
    """

    name: str
    share: float = 1.0
    values: dict[str, Any] = dataclasses.field(default_factory=dict)


ANSWERS = (
    Answers(name="answers"),
    Answers(name="answers_greedy", values={"distill.greedy_fraction": 1.0}),
    Answers(name="answers_sampled", values={"distill.greedy_fraction": 0.0}),
    Answers(name="answers_eighth", share=0.125),
    Answers(name="answers_quarter", share=0.25),
    Answers(name="answers_half", share=0.5),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """A drafter.

    Attributes:
      name: its folder, and its name in the records.
      phase: 1 or 2.
      seed: of training.
      after: name of the phase-1 run it starts from; empty: none.
      source: instruction file, without its ending.
      answers: folder of answers; empty: the file's own.
      values: further config values.
    """

    name: str
    phase: int
    seed: int = 0
    after: str = ""
    source: str = "instructions"
    answers: str = ""
    values: dict[str, Any] = dataclasses.field(default_factory=dict)


_TEXT_ONLY = {"model.kind": "text"}


def trainings() -> list[Training]:
    """All drafters of a family, each after the one it starts from."""
    out = []
    for seed in SEEDS:
        phase1 = f"phase1-{seed}"
        out += [
            Training(name=phase1, phase=1, seed=seed, source="captions"),
            Training(name=f"massv_{seed}", phase=2, seed=seed, after=phase1, answers="answers"),
            # The control that the paper lacks: the same answers, without eyes.
            Training(name=f"text_tuned_{seed}", phase=2, seed=seed, answers="answers",
                     values=_TEXT_ONLY),
            Training(name=f"original_{seed}", phase=2, seed=seed, after=phase1),
        ]  # fmt: skip
    first = {"phase": 2, "after": "phase1-0"}
    out += [
        Training(name="own_wording", **first, source="instructions_own_wording"),
        Training(name="no_phase1", phase=2, answers="answers"),
        Training(name="greedy_answers", **first, answers="answers_greedy"),
        Training(name="sampled_answers", **first, answers="answers_sampled"),
        Training(name="kl", **first, answers="answers",
                 values={"loss.ce": 0.0, "loss.kl": 1.0, "loss.teacher": "target"}),
        Training(name="tv", **first, answers="answers",
                 values={"loss.ce": 0.0, "loss.tv": 1.0, "loss.teacher": "target"}),
        Training(name="log_acceptance", **first, answers="answers",
                 values={"loss.ce": 0.0, "loss.log_acceptance": 1.0, "loss.teacher": "target"}),
        Training(name="ce_tv", **first, answers="answers",
                 values={"loss.tv": 1.0, "loss.teacher": "target"}),
        Training(name="pooled", phase=1, seed=0, source="captions", values={"model.pooling": 2}),
        Training(name="pooled_2", phase=2, after="pooled", answers="answers",
                 values={"model.pooling": 2}),
    ]  # fmt: skip
    out += [
        Training(name=share, **first, answers=f"answers_{share}")
        for share in ("eighth", "quarter", "half")
    ]
    return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Arms that are told of together: `massv_jax.compare`.

    Attributes:
      section: under the family's.
      arms: name -> its runs.
      baseline: an arm.
      note: for the page.
    """

    section: str
    arms: dict[str, tuple[str, ...]]
    baseline: str
    note: str = ""


def _of_seeds(name: str) -> tuple[str, ...]:
    return tuple(f"{name}_{seed}" for seed in SEEDS)


COMPARISONS = (
    Comparison(
        section="headline", baseline="text",
        arms={
            "text": ("text",), "text_tuned": _of_seeds("text_tuned"),
            "original": _of_seeds("original"), "massv": _of_seeds("massv"),
        },
        note="original: phase 2 on the data set's own answers, in another author's wording",
    ),
    Comparison(
        section="self_distillation", baseline="massv",
        arms={"massv": _of_seeds("massv"), "original": _of_seeds("original")},
    ),
    Comparison(
        section="variants", baseline="paper",
        arms={
            "paper": ("massv_0",), "own_wording": ("own_wording",), "no_phase1": ("no_phase1",),
            "greedy_answers": ("greedy_answers",), "sampled_answers": ("sampled_answers",),
            "kl": ("kl",), "tv": ("tv",), "log_acceptance": ("log_acceptance",),
            "ce_tv": ("ce_tv",), "pooled_2": ("pooled_2",),
        },
        note="own_wording: the data set's answers as the target would word them",
    ),
    Comparison(
        section="distilled_samples", baseline="all",
        arms={"eighth": ("eighth",), "quarter": ("quarter",), "half": ("half",),
              "all": ("massv_0",)},
        note="share of the distilled answers, for the same number of steps",
    ),
)  # fmt: skip
