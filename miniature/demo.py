"""`python -m miniature.demo [--scale=smoke]`: VLV and MASSV from the stand-ins to a report.

It only runs the public commands, and prints each one before it does.
"""

import json
import pathlib
import sys
import time

from absl import app, flags

from miniature.commands import keep_compiled_programs, keep_memory, run, world_path
from miniature.demo_massv import check_massv, demonstrate_massv
from miniature.world.folder import write_folder

_SCALE = flags.DEFINE_enum(
    "scale", "full", ["full", "smoke"], "smoke: a few steps of everything, in a few minutes."
)
_ROOT = flags.DEFINE_string("root", "runs", "Where data and runs go.")
_ONLY = flags.DEFINE_enum("only", "both", ["both", "vlv", "massv"], "Which of the two methods.")
# What must hold after the full demo (shape, colour and size all right; places and relations).
THRESHOLDS = {"object_f1": 0.75, "relation_f1": 0.60}

_SMOKE = {
    "run.steps": 4, "run.log_every": 2, "run.save_every": 100, "run.sample_every": 100,
    "optimizer.total_steps": 4, "optimizer.warmup_steps": 1, "data.batch_size": 8,
    "sampling.num_steps": 2, "sampling.batch_size": 8, "sampling.max_new_tokens": 16,
}  # fmt: skip
_SMOKE_EVALUATION = {
    "evaluation.num_captions": 16, "evaluation.num_redrawn": 8, "evaluation.num_denoising": 8,
    "evaluation.bootstrap_samples": 100,
}  # fmt: skip


def main(argv: list[str]) -> None:
    """Entry point."""
    del argv
    began = time.time()
    smoke = _SCALE.value == "smoke"
    root = pathlib.Path(_ROOT.value).absolute()
    keep_compiled_programs(root)
    keep_memory()
    demo = root / ("demo-smoke" if smoke else "demo")
    vlv, massv = (_ONLY.value in ("both", name) for name in ("vlv", "massv"))
    if vlv:
        _demonstrate_vlv(root, demo, smoke=smoke)
    if massv:
        demonstrate_massv(root, demo, smoke=smoke)
    print(f"\n{(time.time() - began) / 60:.1f} minutes. Look at {demo / 'report.html'}", flush=True)
    if smoke:
        return
    checks = [(vlv, _check), (massv, check_massv)]
    if missed := [say for made, check in checks if made and (say := check(demo / "report.json"))]:
        sys.exit("; ".join(missed))


def _demonstrate_vlv(root: pathlib.Path, demo: pathlib.Path, *, smoke: bool) -> None:
    builder = "smoke" if smoke else "full"
    world = root / "miniature_world"
    run("miniature.build", data_dir=world, builder=builder)
    path = world_path(world, builder)
    common = {"data.source.path": path, "evaluation.source.path": path}
    common |= _SMOKE if smoke else {}
    stage2 = common | {"run.init_from": demo / "stage1"}
    _train(1, demo, common)
    _train(2, demo, stage2)
    images = demo / "images"
    write_folder(images, split="heldout", start=5000, count=8 if smoke else 48)
    config = "configs/vlv_stage2.py:mini"
    run(
        "vlv_jax.caption", config=config, workdir=demo / "stage2",
        input=images, output=demo / "captions.jsonl", config_values=stage2,
    )  # fmt: skip
    run(
        "vlv_jax.evaluate", config=config, workdir=demo / "stage2", out=demo,
        parts="captions,reconstruction", title="VLV in miniature",
        config_values=stage2 | (_SMOKE_EVALUATION if smoke else {}),
    )  # fmt: skip


def _train(stage: int, demo: pathlib.Path, values: dict) -> None:
    run(
        "vlv_jax.train", config=f"configs/vlv_stage{stage}.py:mini",
        workdir=demo / f"stage{stage}", config_values=values,
    )  # fmt: skip


def _check(report: pathlib.Path) -> str:
    """What is wrong, if anything."""
    caption = json.loads(report.read_text())["vlv"]["caption"]
    low = []
    for name, threshold in THRESHOLDS.items():
        value = caption[name]["value"]
        print(f"{name} {value:.3f} (at least {threshold})", flush=True)
        if value < threshold:
            low.append(name)
    return f"below the threshold: {', '.join(low)}" if low else ""


if __name__ == "__main__":
    app.run(main)
