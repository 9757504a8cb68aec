"""The demo's second half: a drafter for the vision-language stand-in, by the public commands."""

import json
import pathlib
from typing import Any

from miniature.commands import run

VARIANT = "mini"
_SMOKE = {
    "run.steps": 4, "run.log_every": 2, "run.save_every": 100, "optimizer.total_steps": 4,
    "optimizer.warmup_steps": 1, "data.batch_size": 8,
}  # fmt: skip
_SMOKE_DISTILL = {"distill.max_samples": 16, "distill.batch_size": 8, "distill.chunk_size": 8,
                  "distill.max_new_tokens": 8}  # fmt: skip
_SMOKE_EVALUATION = {
    "evaluation.num_prompts": 4, "evaluation.min_answer_tokens": 2,
    "evaluation.bootstrap_samples": 50, "decoding.max_new_tokens": 8,
}  # fmt: skip


def demonstrate_massv(root: pathlib.Path, demo: pathlib.Path, *, smoke: bool) -> None:
    """Phase 1, the target's answers, phase 2, and a table beside VLV's in the report.

    Args:
      root: where data goes.
      demo: where runs and the report go.
      smoke: a few steps of everything.
    """
    world, runs = root / ("miniature_llava_smoke" if smoke else "miniature_llava"), demo / "massv"
    size = {"train": 24, "heldout": 4} if smoke else {}
    run("miniature.instructions", out=world, **size)
    sources = {
        name: {"data.source.path": world / f"{name}.json", "data.source.images": world / "images"}
        for name in ("captions", "instructions")
    }
    few: dict[str, Any] = _SMOKE if smoke else {}
    run(
        "massv_jax.train", config=f"configs/massv_phase1.py:{VARIANT}", workdir=runs / "phase1",
        config_values=sources["captions"] | few,
    )  # fmt: skip
    run(
        "massv_jax.distill", config=f"configs/massv_distill.py:{VARIANT}", out=runs / "answers",
        config_values=sources["instructions"] | (_SMOKE_DISTILL if smoke else {}),
    )  # fmt: skip
    run(
        "massv_jax.train", config=f"configs/massv_phase2.py:{VARIANT}", workdir=runs / "phase2",
        config_values=sources["instructions"] | few | {
            "data.answers": runs / "answers", "data.answer_images": world / "images",
            "run.init_from": runs / "phase1",
        },
    )  # fmt: skip
    run("massv_jax.export", workdir=runs / "phase2", out=runs / "drafter")
    held_out = {
        "evaluation.source.path": world / "heldout.json",
        "evaluation.source.images": world / "images",
        "evaluation.gammas": "(5,)", "model.drafter": runs / "drafter",
    }  # fmt: skip
    run(
        "massv_jax.evaluate", config=f"configs/massv_eval.py:{VARIANT}", out=demo,
        title="VLV and MASSV in miniature",
        config_values=held_out | (_SMOKE_EVALUATION if smoke else {}),
    )  # fmt: skip


def check_massv(report: pathlib.Path) -> str:
    """MASSV's drafts are taken more often than the text-only drafter's; answers stay the same.

    Returns:
      What is wrong, if anything.
    """
    found = json.loads(report.read_text())["massv"]["descriptions"]["t0"]["gamma5"]
    massv, text = (found[arm]["emitted_length"]["value"] for arm in ("massv", "text"))
    print(f"tokens a pass: {massv:.2f} with MASSV, {text:.2f} with text only", flush=True)
    same = {arm: found[arm]["identical_to_plain"]["value"] for arm in ("massv", "text")}
    if massv <= text or min(same.values()) < 1.0:
        return f"MASSV {massv:.2f}, text {text:.2f} tokens a pass; same as plain: {same}"
    return ""
