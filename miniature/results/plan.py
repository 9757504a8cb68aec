"""Which runs the README's figures come from, and what is compared with what."""

import dataclasses
from typing import Any

SEEDS = (0, 1, 2)
# What a stage-2 run trains: vlv_jax.stage2.TRAINABLE_* in the words of a command line.
PROJECTOR, LANGUAGE_MODEL = r"projector/.*", r"language_model/.*"
BART = r"florence2/language_model/(encoder|decoder)/.*"
BRIDGE = r"bridge/.*"
# How fast each part moves, against the base rate; as in configs/vlv_stage2.py, and the queries as
# fast as in stage 1.
PACES = {PROJECTOR: 10.0, BART: 0.06, BRIDGE: 8.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """Optimizer steps of the headline runs and of the ablations, and how much is evaluated."""

    stage1: int
    stage2: int
    ablation1: int
    ablation2: int
    images: int
    redrawn: int


BUDGETS = {
    "full": Budget(
        stage1=3200, stage2=6800, ablation1=600, ablation2=500, images=500, redrawn=64,
    ),
    "smoke": Budget(stage1=2, stage2=2, ablation1=2, ablation2=2, images=8, redrawn=8),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One training run and its evaluation.

    Attributes:
      name: its folder.
      stage: 1 or 2.
      steps: of training.
      seed: of training.
      variant: of the config.
      after: name of the stage-1 run it starts from; empty: none.
      values: further config values.
      parts: of `vlv_jax.evaluate`; those that the run is compared by.
    """

    name: str
    stage: int
    steps: int
    seed: int = 0
    variant: str = "mini"
    after: str = ""
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    parts: str = ""

    @property
    def config(self) -> str:
        """As on a command line."""
        return f"configs/vlv_stage{self.stage}.py:{self.variant}"

    @property
    def evaluated_parts(self) -> str:
        """The run's own, or its stage's."""
        return self.parts or ("reconstruction,denoising" if self.stage == 1 else "captions")


def runs(budget: Budget) -> list[Run]:
    """All runs, every one after the one it starts from."""
    out = []
    for seed in SEEDS:
        out.append(Run(name=f"stage1-{seed}", stage=1, steps=budget.stage1, seed=seed))
        out.append(
            Run(name=f"stage2-{seed}", stage=2, steps=budget.stage2, seed=seed,
                after=f"stage1-{seed}", parts="captions,vqa")
        )  # fmt: skip
    out += [
        Run(name=f"queries-{queries}", stage=1, steps=budget.ablation1,
            values={"model.num_queries": queries})
        for queries in (8, 32)
    ]  # fmt: skip
    for name, part in (("quarter", 4), ("half", 2), ("short", 1)):
        out.append(Run(name=name, stage=1, steps=max(1, budget.ablation1 // part)))
    for name, trainable, after in (
        ("mlp", (PROJECTOR,), "stage1-0"),
        ("mlp_llm", (PROJECTOR, LANGUAGE_MODEL), "stage1-0"),
        ("all", (PROJECTOR, LANGUAGE_MODEL, BART), "stage1-0"),
        ("no_stage1-paper", (PROJECTOR, LANGUAGE_MODEL), ""),
        ("no_stage1-fair", (PROJECTOR, LANGUAGE_MODEL, BART, BRIDGE), ""),
    ):
        out.append(
            Run(name=name, stage=2, steps=budget.ablation2, after=after,
                values=_captioning_alone(trainable))
        )  # fmt: skip
    for size in ("small", "large"):
        out.append(
            Run(name=size, stage=2, variant=f"mini-{size}", steps=budget.ablation2,
                after="stage1-0", values=_captioning_alone((PROJECTOR, LANGUAGE_MODEL)))
        )  # fmt: skip
    return out


def _captioning_alone(trainable: tuple[str, ...]) -> dict[str, Any]:
    """The paper's second stage, which is what its tables compare: no joint loss."""
    paces = tuple((pattern, PACES[pattern]) for pattern in trainable if pattern in PACES)
    return {
        "trainable": repr(trainable), "optimizer.lr_multipliers": repr(paces),
        "captioning.reconstruction_weight": 0.0,
    }  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is told of some runs together: `vlv_jax.compare`.

    Attributes:
      section: of the report.
      arms: name -> names of its runs.
      metrics: of vlv_jax.evaluate, or "all".
      baseline: an arm, or empty.
      note: for the page.
    """

    section: str
    arms: dict[str, tuple[str, ...]]
    metrics: str = "all"
    baseline: str = ""
    note: str = ""


_REDRAWING = ",".join((
    "stage1.denoising_loss.vlv", "reconstruction.pixel_mse.vlv", "reconstruction.davit_cosine.vlv",
))  # fmt: skip
_CAPTIONING = "caption.object_f1,caption.relation_f1"
COMPARISONS = (
    Comparison(
        section="vlv", arms={"vlv": tuple(f"stage1-{s}" for s in SEEDS)},
        note="The true caption is a hard bar: it names shape, colour, size, texture and cell of "
        "every object, nearly all that a scene is drawn from, and the decoder learned from such "
        "captions. VLV has to see all of it in the image. Where its loss is above the caption's, "
        "that is what it does not see; 'shape' under caption says how much that is.",
    ),
    Comparison(
        section="vlv", arms={"vlv": tuple(f"stage2-{s}" for s in SEEDS)},
        note="An object counts if shape, colour and size are all right.",
    ),
    Comparison(
        section="vlv.ablations.T4a_queries", metrics=_REDRAWING, baseline="q77",
        arms={"q8": ("queries-8",), "q32": ("queries-32",), "q77": ("short",)},
        note="Number of queries in stage 1, as in the paper's table 4a.",
    ),
    Comparison(
        section="vlv.ablations.T4b_trainable", metrics=_CAPTIONING, baseline="mlp_llm_encoder",
        arms={"mlp": ("mlp",), "mlp_llm": ("mlp_llm",), "mlp_llm_encoder": ("all",)},
        note="What stage 2 trains, as in the paper's table 4b.",
    ),
    Comparison(
        section="vlv.ablations.T5a_images", metrics=_REDRAWING, baseline="all",
        arms={"quarter": ("quarter",), "half": ("half",), "all": ("short",)},
        note="Images seen in stage 1, as in the paper's table 5a.",
    ),
    Comparison(
        section="vlv.ablations.T5b_language_model", metrics=_CAPTIONING, baseline="medium",
        arms={"small": ("small",), "medium": ("mlp_llm",), "large": ("large",)},
        note="Size of the language model, as in the paper's table 5b.",
    ),
    Comparison(
        section="vlv.ablations.T7_paper", metrics=_CAPTIONING, baseline="stage1",
        arms={"stage1": ("mlp_llm",), "no_stage1": ("no_stage1-paper",)},
        note="Without stage 1 as the paper's table 7 has it: queries, projection and encoder stay "
        "as they are, random or Florence-2's. The baseline's are frozen too, after stage 1.",
    ),
    Comparison(
        section="vlv.ablations.T7_fair", metrics=_CAPTIONING, baseline="stage1",
        arms={"stage1": ("all",), "no_stage1": ("no_stage1-fair",)},
        note="Without stage 1, but queries, projection and encoder are trained in stage 2, for the "
        "same number of stage-2 steps.",
    ),
)  # fmt: skip
