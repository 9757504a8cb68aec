"""Where networks lie while answers are generated: on this process's own devices.

Every process works for itself. A target that one device does not hold is split over the axis
"tensor" of the config's mesh, heads and features as `DEFAULT_RULES` say: each new token needs every
weight, so weights must stay where they are and activations, a few rows of them, travel.
"""

import os
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh

from core_jax.sharding import DEFAULT_RULES, make_mesh
from massv_jax.experiment import Experiment


def local_mesh(experiment: Experiment) -> Mesh | None:
    """The config's mesh over this process's own devices; None for a single one."""
    devices = jax.local_devices()
    return make_mesh(experiment.run.mesh, devices) if len(devices) > 1 else None


def tensor_mesh(experiment: Experiment) -> Mesh | None:
    """`local_mesh` where it splits networks over "tensor"; None elsewhere.

    For answers to a few prompts: their rows are not split, so another axis would have every device
    do the same work.
    """
    return local_mesh(experiment) if experiment.run.mesh.get("tensor", 1) != 1 else None


def target_options(path: str | os.PathLike, mesh: Mesh | None) -> dict[str, Any]:
    """What `load_target` takes, beside precision, to put a target on a mesh."""
    if mesh is None:
        return {}
    if (pathlib.Path(path) / "config.json").is_file():
        return {"mesh": mesh, "rules": DEFAULT_RULES}
    return {"mesh": mesh}


def data_parallel(mesh: Mesh | None) -> int:
    """Parts into which rows are split."""
    shape = {} if mesh is None else mesh.shape
    return shape.get("data", 1) * shape.get("fsdp", 1)
