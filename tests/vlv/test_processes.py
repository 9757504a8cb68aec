"""Training by real processes on localhost is training by one."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from core_jax.partition import flatten
from core_jax.train.checkpoint import load_params

ROOT = pathlib.Path(__file__).parents[2]


def _train(experiment, workdir, processes, devices=8):
    file = workdir.with_suffix(".json")
    file.write_text(json.dumps(experiment))
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
        "PYTHONPATH": path,
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    words = [
        sys.executable, "-m", "launch", "local", f"--processes={processes}",
        f"--devices_per_process={devices // processes}", f"--workdir={workdir}",
        f"--config=tests/vlv/json_config.py:{file}", "--execute", "--", "vlv_jax.train",
    ]  # fmt: skip
    run = subprocess.run(words, cwd=ROOT, env=env, text=True, capture_output=True, check=False)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return flatten(load_params(str(workdir), ema=False)), rows


MESHES = {"data": {"data": -1}, "fsdp": {"data": 2, "fsdp": -1}}


@pytest.fixture(scope="module", params=sorted(MESHES))
def alone(request, tiny_hub, tmp_path_factory):
    """Two steps of one process with eight devices."""
    experiment = tiny_hub.experiment(stage=1, steps=2, mesh=MESHES[request.param])
    return experiment, *_train(experiment, tmp_path_factory.mktemp("alone") / "run", 1)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_steps_of_several_processes_are_those_of_one(alone, tmp_path, processes):
    experiment, params, rows = alone
    together, others = _train(experiment, tmp_path / "run", processes)
    assert together.keys() == params.keys()
    for name, leaf in params.items():
        np.testing.assert_allclose(together[name], leaf, rtol=0, atol=2e-5, err_msg=name)
    # As many rows: process 0 alone writes.
    np.testing.assert_allclose(
        [row["loss"] for row in others], [row["loss"] for row in rows], rtol=1e-4
    )
