"""`python -m launch.plan`: what a job needs and takes on a pod, before there is one.

The step that training runs is compiled for the pod by the TPU's own compiler; no weight, image or
TPU is needed.
"""

import json
import pathlib

from absl import app, flags, logging
from ml_collections import config_flags

from core_jax.config import ConfigError
from core_jax.models.presets import UnknownPresetError
from launch.errors import PlanError
from launch.topology import parse_topology, prepare_environment

prepare_environment()

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment file, such as configs/vlv_stage1.py.", lock_config=True
)
_JOB = flags.DEFINE_enum("job", "", ["", "cache"], "Another job of the same config.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "Pod slice, such as v5e:16x16 or v5p:4x4x8.")
_GPU = flags.DEFINE_string("gpu", None, "One GPU instead: a100, h100 or h200; nothing is compiled.")
_SLICES = flags.DEFINE_integer("slices", 1, "How many such slices.")
_PRICE = flags.DEFINE_float("price_per_chip_hour", None, "For the price of the run.")
_EFFORT = flags.DEFINE_enum("effort", "low", ["low", "full"], "Of the compiler.")
_FIT = flags.DEFINE_bool("fit", False, "Also find the largest batch a device; two more compiles.")
_REMEDIES = flags.DEFINE_integer(
    "remedies", 2, "Where the step does not fit: at most so many changes are compiled."
)
_JSON = flags.DEFINE_string("json", None, "File to write the plan to, as JSON.")
_HTML = flags.DEFINE_string("html", None, "File to write the plan to, as a page.")


def main(argv: list[str]) -> None:
    """Makes the plan; a user's mistake ends with one line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)  # jax tells that it finds no TPU
    try:
        _run()
    except (PlanError, ConfigError, UnknownPresetError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error


def _run() -> None:
    import dataclasses

    from launch.fitting import fit_batch
    from launch.jobs import job_of
    from launch.plan_text import as_html, as_text
    from launch.planning import make_gpu_plan, make_plan
    from launch.remedies import try_remedies

    if bool(_TOPOLOGY.value) == bool(_GPU.value):
        raise PlanError("name one of --topology (v5e:16x16) and --gpu (h200)")
    job = job_of(_CONFIG.value.to_dict(), _JOB.value)
    named = " ".join([config_flags.get_config_filename(flags.FLAGS["config"]), *_changes()])
    if _GPU.value:
        plan = make_gpu_plan(
            job, gpu_chip(_GPU.value), config=named, price_per_chip_hour=_PRICE.value
        )
    else:
        topology = parse_topology(_TOPOLOGY.value or "", _SLICES.value)
        plan = make_plan(
            job, topology, config=named, effort=_EFFORT.value, price_per_chip_hour=_PRICE.value
        )
        if plan.fits is False and _REMEDIES.value > 0:
            tried = try_remedies(job, topology, plan, _EFFORT.value, _REMEDIES.value)
            plan = dataclasses.replace(plan, remedies=tried)
        if _FIT.value:
            plan = dataclasses.replace(plan, fit=fit_batch(job, topology, plan, _EFFORT.value))
    print(as_text(plan), end="")
    if _JSON.value:
        _write(_JSON.value, json.dumps(plan.to_json(), indent=2) + "\n")
    if _HTML.value:
        _write(_HTML.value, as_html(plan))


def gpu_chip(name: str):
    """A GPU of the table.

    Raises:
      PlanError: there is no such GPU.
    """
    from launch.chips import CHIPS

    known = [n for n, chip in CHIPS.items() if not chip.is_tpu]
    if name not in known:
        raise PlanError(f"gpu {name!r} is unknown; choose from {', '.join(known)}")
    return CHIPS[name]


def _changes() -> list[str]:
    overrides = config_flags.get_override_values(flags.FLAGS["config"])
    return [f"--config.{name}={value}" for name, value in sorted(overrides.items())]


def _write(path: str, content: str) -> None:
    file = pathlib.Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config"])
    app.run(main)
