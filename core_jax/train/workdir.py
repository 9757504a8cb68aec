"""What every run's directory holds beside its checkpoints."""

import dataclasses
import json
import pathlib
from typing import Any

from core_jax.files import write_whole
from core_jax.train.run_record import CHECKPOINT_DIR

EXPERIMENT_FILE = "experiment.json"


class WorkdirError(ValueError):
    """A directory is not what the command needs; the message says what it lacks."""


def save_experiment(workdir: pathlib.Path, experiment: Any) -> None:
    """Writes the resolved config, from which every later command finds the run's networks.

    Only once `decide_start` has said that the run may go on: a refused config must leave nothing.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    content = json.dumps(dataclasses.asdict(experiment), indent=2, sort_keys=True)
    write_whole(workdir / EXPERIMENT_FILE, content + "\n")


def newest_step(path: pathlib.Path) -> int | None:
    """Step of the newest checkpoint of a run; None for other directories."""
    folder = pathlib.Path(path) / CHECKPOINT_DIR
    if not folder.is_dir():
        return None
    return max((int(p.name) for p in folder.iterdir() if p.name.isdigit()), default=None)
