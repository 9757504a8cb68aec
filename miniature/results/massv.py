"""MASSV's part of `python -m miniature.results`: drafters of both families, by public commands."""

import pathlib
from typing import Any

from miniature import standins
from miniature.commands import run, run_words
from miniature.results.massv_plan import (
    ANSWERS,
    BUDGETS,
    COMPARISONS,
    FAMILIES,
    Answers,
    Budget,
    Training,
    trainings,
)
from miniature.results.once import once

_SMOKE = {"data.batch_size": 8, "run.log_every": 1}
_SMOKE_DISTILL = {"distill.batch_size": 8, "distill.chunk_size": 8, "distill.max_new_tokens": 8}
_SMOKE_EVALUATION = {
    "evaluation.min_answer_tokens": 2, "evaluation.bootstrap_samples": 50,
    "decoding.max_new_tokens": 8,
}  # fmt: skip
GAMMA = 5  # of the comparisons; others are measured for one drafter
WINDOWS = (1, 2, 3, 5, 7)
# Target -> some 39 million parameters, by layers that change nothing (miniature.grow).
GROWN = {"qwen2_5_vl": standins.CHECKPOINTS / "qwen2.5-vl"}
GROWN_LAYERS, GROWN_MLP = 16, 6144
TITLE = "Results in miniature"


class Drafters:
    """All drafters of one family.

    Args:
      family: a key of `FAMILIES`.
      root: where data and runs go.
      smoke: a few steps of everything.
    """

    def __init__(self, family: str, root: pathlib.Path, *, smoke: bool):
        self.family, self.variant, self.smoke = family, FAMILIES[family], smoke
        self.budget: Budget = BUDGETS["smoke" if smoke else "full"]
        self.world = root / ("massv_world_smoke" if smoke else "massv_world")
        self.folder = root / ("results-smoke" if smoke else "results") / family

    def make_all(self, out: pathlib.Path) -> None:
        """Everything that is not there yet, and its comparisons in the report."""
        size = {"train": self.budget.train, "heldout": self.budget.heldout}
        run("miniature.instructions", out=self.world, **size)
        for answers in ANSWERS:
            once(self.folder / answers.name / "done", self._distill, answers)
        for planned in trainings():
            once(self.folder / planned.name / "trained", self._train, planned)
        names = [t.name for t in trainings() if t.phase == 2]
        once(self.folder / "measured", self._evaluate, names, self.folder / "arms", (GAMMA,))
        once(self.folder / "windows-measured", self._time, out)
        if self.family in GROWN:
            once(self.folder / "grown-measured", self._time_grown, out)
        for comparison in COMPARISONS:
            arms = [f"{name}={','.join(runs)}" for name, runs in comparison.arms.items()]
            words = ["--records", str(self.folder / "arms"), "--arms", *arms]
            words += ["--baseline", comparison.baseline, "--note", comparison.note]
            words += ["--section", f"massv.{self.family}.{comparison.section}"]
            run_words("massv_jax.compare", [*words, "--out", str(out), "--title", TITLE])

    def _source(self, name: str) -> dict[str, Any]:
        return {
            "data.source.path": self.world / f"{name}.json",
            "data.source.images": self.world / "images",
        }

    def _distill(self, answers: Answers) -> None:
        samples = max(8, round(self.budget.answers * answers.share))
        run(
            "massv_jax.distill", config=f"configs/massv_distill.py:{self.variant}",
            out=self.folder / answers.name,
            config_values=self._source("instructions") | {"distill.max_samples": samples}
            | answers.values | (_SMOKE_DISTILL if self.smoke else {}),
        )  # fmt: skip

    def _train(self, planned: Training) -> None:
        steps = self.budget.phase1 if planned.phase == 1 else self.budget.phase2
        values = self._source(planned.source) | {
            "run.steps": steps, "optimizer.total_steps": steps, "run.seed": planned.seed,
            "optimizer.warmup_steps": round(0.03 * steps),
        }  # fmt: skip
        if planned.phase == 2:
            values |= {
                "data.answers": self.folder / planned.answers if planned.answers else "",
                "data.answer_images": self.world / "images",
                "run.init_from": self.folder / planned.after if planned.after else "",
            }
        run(
            "massv_jax.train", config=f"configs/massv_phase{planned.phase}.py:{self.variant}",
            workdir=self.folder / planned.name,
            config_values=values | planned.values | (_SMOKE if self.smoke else {}),
        )  # fmt: skip

    def _evaluate(self, names: list[str], out: pathlib.Path, gammas: tuple[int, ...]) -> None:
        words = [f"--arm={name}={self.folder / name}" for name in names]
        values = {"evaluation.gammas": repr(gammas), "evaluation.num_prompts": self.budget.prompts}
        self._measure(f"massv.{self.family}", out, words, values | {"decoding.batch_size": 10})

    def _time(self, out: pathlib.Path) -> None:
        """Passes and seconds of the first seed's drafter at several windows."""
        words = [f"--arm=massv={self.folder / 'massv_0'}"]
        values = {"evaluation.gammas": repr(WINDOWS), "decoding.batch_size": 10}
        values |= {"evaluation.num_prompts": self.budget.prompts}
        self._measure(
            f"massv.{self.family}.windows", out, words,
            values | {"evaluation.num_timed": self.budget.timed},
        )  # fmt: skip

    def _time_grown(self, out: pathlib.Path) -> None:
        """The same for a target of the same outputs at the cost of reading many weights."""
        grown, drafter = self.folder / "grown", self.folder / "grown-drafter"
        exported = self.folder / "drafter"
        run("massv_jax.export", workdir=self.folder / "massv_0", out=exported)
        run(
            "miniature.grow", target=GROWN[self.family], out=grown, layers=GROWN_LAYERS,
            intermediate_size=GROWN_MLP,
        )  # fmt: skip
        run("massv_jax.rebind", drafter=exported, was=GROWN[self.family], target=grown, out=drafter)
        self._measure(
            f"massv.{self.family}.grown", out, [f"--arm=massv={drafter}"], {
                "model.target": grown, "evaluation.gammas": repr(WINDOWS),
                "evaluation.temperatures": "(0.0,)", "evaluation.num_prompts": self.budget.timed,
                "evaluation.num_timed": self.budget.timed, "decoding.batch_size": 5,
            },
        )  # fmt: skip

    def _measure(
        self, section: str, out: pathlib.Path, arms: list[str], values: dict[str, Any]
    ) -> None:
        words = [f"--config=configs/massv_eval.py:{self.variant}", f"--out={out}", "--arm=text"]
        words += [*arms, f"--section={section}", f"--title={TITLE}"]
        values = values | {
            "evaluation.source.path": self.world / "heldout.json",
            "evaluation.source.images": self.world / "images",
        }  # fmt: skip
        values |= _SMOKE_EVALUATION if self.smoke else {}
        words += [f"--config.{name}={value}" for name, value in values.items()]
        run_words("massv_jax.evaluate", words)
