"""Answers prompts about images, with or without a drafter.

    python -m massv_jax.generate --config configs/massv_eval.py:mini \
        --input prompts.jsonl --output answers.jsonl [--drafter DIR|text|lookup|none]
    python -m massv_jax.generate --target DIR --drafter DIR --input ... --output ...

A line of the input is {"id": ..., "prompt": ..., "image": ...}. Running the same command again goes
on where it stopped, and tries again what failed; with other settings it is refused. With several
processes, process i takes every n-th prompt. With --adaptive, windows follow measured speed;
--replay repeats such a run from its log (of several processes, from their logs in one file).
"""

import pathlib
from typing import Any

import jax
from absl import flags

from massv_jax.commands import run_command
from massv_jax.experiment import DataConfig, DecodingConfig, Experiment

_DECODING = ("gamma", "accept", "temperature", "top_k", "top_p", "min_confidence",
             "max_new_tokens", "batch_size", "seed")  # fmt: skip


def _define() -> None:
    flags.DEFINE_string("input", None, "JSONL file of prompts.", required=True)
    flags.DEFINE_string("output", None, "JSONL file to write.", required=True)
    flags.DEFINE_string("target", None, "Hub directory of the target; the config's by default.")
    flags.DEFINE_string(
        "drafter", None, "Directory, or text, lookup, none; the config's by default."
    )
    flags.DEFINE_string("image_root", None, "Images are relative to it; the input's folder.")
    flags.DEFINE_integer("min_pixels", None, "Overrides data.min_pixels, a limit of images.")
    flags.DEFINE_integer("max_pixels", None, "Overrides data.max_pixels.")
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Type of the parameters.")
    flags.DEFINE_bool("adaptive", False, "Choose windows by measured acceptance and cost.")
    flags.DEFINE_string(
        "replay", None, "The <output>.windows.jsonl of an earlier run: its windows, not new ones."
    )
    flags.DEFINE_integer("gamma", None, "Overrides decoding.gamma.")
    flags.DEFINE_enum("accept", None, ["rejection", "coupled"], "Overrides decoding.accept.")
    flags.DEFINE_float("temperature", None, "Overrides decoding.temperature.")
    flags.DEFINE_integer("top_k", None, "Overrides decoding.top_k.")
    flags.DEFINE_float("top_p", None, "Overrides decoding.top_p.")
    flags.DEFINE_float("min_confidence", None, "Overrides decoding.min_confidence.")
    flags.DEFINE_integer("max_new_tokens", None, "Overrides decoding.max_new_tokens.")
    flags.DEFINE_integer("batch_size", None, "Overrides decoding.batch_size.")
    flags.DEFINE_integer("seed", None, "Overrides decoding.seed.")


def _job(experiment: Experiment | None, workdir: pathlib.Path | None) -> None:
    from core_jax.stopping import stop_between
    from massv_jax.generating import (
        change_decoding,
        generate_answers,
        make_decoder,
        summary_line,
    )
    from massv_jax.generating_files import GenerateJob
    from massv_jax.pixels import NAMES as PIXEL_LIMITS
    from massv_jax.pixels import pixel_limits
    from massv_jax.placing import tensor_mesh
    from massv_jax.speculative.adaptive import AdaptiveGamma
    from massv_jax.windows_log import LoggedWindows

    at = stop_between(lambda place: None)
    values = flags.FLAGS
    target = values.target or (experiment.model.target if experiment else "")
    if not target:
        raise SystemExit("error: name a target: --target DIR, or --config FILE")
    drafter = values.drafter
    if drafter is None:
        drafter = str(workdir) if workdir else experiment.model.drafter if experiment else ""
    changes = {n: v for n in _DECODING if (v := getattr(values, n)) is not None}
    decoding = experiment.decoding if experiment else DecodingConfig()
    decoding = change_decoding(decoding, **changes)
    data = experiment.data if experiment else DataConfig()
    limits = pixel_limits(data)
    limits |= {n: v for n in PIXEL_LIMITS if (v := getattr(values, n)) is not None}
    options: dict[str, Any] = {}
    if experiment:
        options = {"dtype": experiment.model.frozen_dtype, "execution": experiment.model.execution}
    if values.dtype:
        options["dtype"] = values.dtype
    if values.replay and (values.adaptive or values.gamma is not None):
        raise SystemExit("error: --replay has windows: leave --adaptive and --gamma out")
    gamma: Any = AdaptiveGamma() if values.adaptive else decoding.gamma
    if values.replay:
        gamma = LoggedWindows.read(values.replay)
    decoder = make_decoder(
        target, drafter,
        language_model=experiment.model.language_model if experiment else "",
        accept=decoding.accept, min_confidence=decoding.min_confidence,
        prompt_lengths=decoding.prompt_lengths if experiment else None,
        limits=limits, mesh=tensor_mesh(experiment) if experiment else None, **options,
    )  # fmt: skip
    job = GenerateJob(
        input=pathlib.Path(values.input).expanduser(),
        output=pathlib.Path(values.output).expanduser(),
        image_root=pathlib.Path(values.image_root) if values.image_root else None,
        batch_size=decoding.batch_size,
        options={
            "max_new_tokens": decoding.max_new_tokens, "temperature": decoding.temperature,
            "top_k": decoding.top_k, "top_p": decoding.top_p, "gamma": gamma,
            "seed": decoding.seed,
        },
        limits=data.limits,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )  # fmt: skip
    at("the first prompt")
    statistics = generate_answers(decoder, job, at=at)
    if statistics is not None:
        print(summary_line(statistics, gamma), flush=True)


if __name__ == "__main__":
    run_command(_job, workdir=False, config=False, define=_define)
