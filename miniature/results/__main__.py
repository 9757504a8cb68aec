"""`python -m miniature.results [--scale=smoke]`: the figures of the README, from the stand-ins.

VLV: three seeds of both stages for the headline, one of every ablation of the paper's tables 4, 5
and 7 (arXiv 2507.07104), each evaluated on the same held-out scenes and compared image by image.
MASSV: three seeds of the paper's arms and of the control that it lacks, one of every variant, for
both families. Only public commands are run, each is printed, and what is finished is not run
again: stop it when you like and type the same command.
"""

import pathlib
import time
from collections.abc import Iterable
from typing import Any

from absl import app, flags

from miniature import standins
from miniature.commands import keep_compiled_programs, keep_memory, run, run_words, world_path
from miniature.results.massv import Drafters
from miniature.results.massv_plan import FAMILIES
from miniature.results.once import once
from miniature.results.plan import BUDGETS, COMPARISONS, Budget, Comparison, Run, runs

_SCALE = flags.DEFINE_enum("scale", "full", ["full", "smoke"], "smoke: a few steps of everything.")
_ROOT = flags.DEFINE_string("root", "runs", "Where data and runs go.")
_OUT = flags.DEFINE_string(
    "out", "", "Where the report goes; by default a folder `report` beside the runs."
)
_ONLY = flags.DEFINE_list("only", [], "Train and evaluate these VLV runs only; compare nothing.")
_PART = flags.DEFINE_enum("part", "both", ["both", "vlv", "massv"], "Which of the two methods.")

LARGEST = "qwen2.5-large"
TITLE, GALLERY = "Results in miniature", 24
_SMOKE = {
    "data.batch_size": 8, "sampling.num_steps": 2, "sampling.batch_size": 8,
    "sampling.max_new_tokens": 8, "evaluation.bootstrap_samples": 50,
}  # fmt: skip


def main(argv: list[str]) -> None:
    """Entry point."""
    del argv
    began = time.time()
    smoke = _SCALE.value == "smoke"
    root = pathlib.Path(_ROOT.value).absolute()
    keep_compiled_programs(root)
    keep_memory()
    folder = root / ("results-smoke" if smoke else "results")
    out = pathlib.Path(_OUT.value).absolute() if _OUT.value else folder / "report"
    if _PART.value in ("both", "vlv"):
        _make_vlv(root, folder, out, smoke=smoke)
    if _PART.value in ("both", "massv") and not _ONLY.value:
        for family in FAMILIES:
            Drafters(family, root, smoke=smoke).make_all(out)
    print(f"{(time.time() - began) / 60:.1f} minutes in this call", flush=True)


def _make_vlv(root: pathlib.Path, folder: pathlib.Path, out: pathlib.Path, *, smoke: bool) -> None:
    builder, budget = ("smoke" if smoke else "full"), BUDGETS[_SCALE.value]
    world = root / "miniature_world"
    path = world_path(world, builder)
    if not path.exists():
        run("miniature.build", data_dir=world, builder=builder)
    shared: dict[str, Any] = {"data.source.path": path, "evaluation.source.path": path}
    shared |= _SMOKE if smoke else {}
    cache = folder / "cache"
    once(cache.with_name("cache.done"), _cache, cache, shared)
    shared["data.cache"] = cache
    for planned in runs(budget):
        if not _ONLY.value or planned.name in _ONLY.value:
            once(folder / planned.name / "trained", _train, planned, folder, shared)
            once(folder / planned.name / "evaluated", _evaluate, planned, folder, shared, budget)
    if not _ONLY.value:
        _show(folder, shared, budget, out)
        _compare(COMPARISONS, folder, out)


def _cache(out: pathlib.Path, shared: dict) -> None:
    """Tower and VAE see every training image once, for all runs."""
    run("vlv_jax.cache", config="configs/vlv_stage1.py:mini", out=out, config_values=shared)


def _values(planned: Run, folder: pathlib.Path, shared: dict) -> dict[str, Any]:
    return shared | {
        "run.steps": planned.steps, "optimizer.total_steps": planned.steps,
        "optimizer.warmup_steps": min(50, planned.steps // 10),
        "run.seed": planned.seed, "run.sample_every": 0,
        "run.init_from": folder / planned.after if planned.after else "",
    } | planned.values  # fmt: skip


def _train(planned: Run, folder: pathlib.Path, shared: dict) -> None:
    run(
        "vlv_jax.train", config=planned.config,
        workdir=folder / planned.name, config_values=_values(planned, folder, shared),
    )  # fmt: skip


def _evaluate(planned: Run, folder: pathlib.Path, shared: dict, budget: Budget) -> None:
    values = _values(planned, folder, shared) | {
        "evaluation.num_captions": budget.images, "evaluation.num_denoising": budget.images,
        "evaluation.num_redrawn": budget.redrawn,
    }  # fmt: skip
    parts = planned.evaluated_parts
    answering = {"answerer": standins.CHECKPOINTS / LARGEST} if "vqa" in parts else {}
    run(
        "vlv_jax.evaluate", config=planned.config,
        workdir=folder / planned.name, out=folder / planned.name,
        parts=parts, config_values=values, **answering,
    )  # fmt: skip


def _show(folder: pathlib.Path, shared: dict, budget: Budget, out: pathlib.Path) -> None:
    """Pictures and captions of the first seed; its numbers make way for the mean over seeds."""
    planned = next(r for r in runs(budget) if r.stage == 2)
    shown = {"evaluation.num_captions": GALLERY, "evaluation.num_redrawn": GALLERY}
    run(
        "vlv_jax.evaluate", config=planned.config, workdir=folder / planned.name,
        out=out, parts="captions,reconstruction", title=TITLE,
        config_values=_values(planned, folder, shared) | shown,
    )  # fmt: skip


def _compare(comparisons: Iterable[Comparison], folder: pathlib.Path, out: pathlib.Path) -> None:
    for comparison in comparisons:
        arms = [
            f"{name}={','.join(str(folder / run_name) for run_name in names)}"
            for name, names in comparison.arms.items()
        ]
        words = ["--arms", *arms, "--metric", comparison.metrics, "--out", str(out)]
        words += ["--section", comparison.section, "--note", comparison.note]
        words += ["--baseline", comparison.baseline, "--title", TITLE]
        run_words("vlv_jax.compare", words)


if __name__ == "__main__":
    app.run(main)
