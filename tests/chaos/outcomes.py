"""What a job made, as name -> hash: equal exactly where everything is bitwise equal."""

import hashlib
import json
import pathlib

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from core_jax.train.workdir import newest_step

# Of a line of metrics: what depends on the clock (`bad_fraction`: on how far was read ahead).
_CLOCK = ("time", "steps_per_second", "images_per_second", "data_wait", "mfu", "bad_fraction")


def of_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def of_training(workdir: pathlib.Path) -> dict[str, str]:
    """Every leaf of the newest checkpoint, every line of metrics, every sample sheet."""
    step = newest_step(workdir)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    path = (workdir / "checkpoints" / str(step)).resolve()
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        ocp.metadata(path).metadata,
    )
    found = {"newest step": str(step)}
    for name, leaf in _leaves(ocp.load(path, target)):
        found[name] = of_bytes(np.asarray(leaf).tobytes())
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        kept = {k: v for k, v in values.items() if k not in _CLOCK}
        name = f"metrics of step {values['step']}"
        assert name not in found, f"{name} are there twice"
        found[name] = json.dumps(kept, sort_keys=True)
    for sheet in sorted((workdir / "samples").glob("*")):
        found[f"samples/{sheet.name}"] = of_bytes(sheet.read_bytes())
    found["experiment.json"] = of_bytes((workdir / "experiment.json").read_bytes())
    return found


def _leaves(tree):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path), leaf


def of_files(*patterns: str):
    """The bytes of the files that match, and that nothing else lies in the folder."""

    def outcome(folder: pathlib.Path) -> dict[str, str]:
        found = {}
        for pattern in patterns:
            for file in sorted(folder.glob(pattern)):
                if file.is_file():
                    found[file.relative_to(folder).as_posix()] = of_bytes(file.read_bytes())
        return found

    return outcome


