"""A command on `core_jax.commands` that does almost nothing, for real processes to run."""

import dataclasses
import json
import os
import pathlib
import signal
import sys
import time

from core_jax.commands import run_command


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    steps: int = 1
    mesh: dict[str, int] = dataclasses.field(default_factory=lambda: {"data": -1})
    # What goes wrong: nothing, or one of the cases below in the process `culprit`.
    fault: str = ""
    culprit: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    run: Run = Run()


def job(experiment, workdir):
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from core_jax.code_version import code_version
    from core_jax.sharding import make_mesh
    from core_jax.train.preemption import PreemptionGuard

    index = jax.process_index()
    faulty = index == experiment.run.culprit
    if faulty and experiment.run.fault == "raises":
        raise RuntimeError("a fault on purpose")
    if faulty and experiment.run.fault == "refuses":
        raise SystemExit("error: a mistake of the user")
    if faulty and experiment.run.fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    mesh = make_mesh(experiment.run.mesh)
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    ones = jax.make_array_from_callback((jax.device_count(),), sharding, lambda _: jnp.ones(1))
    total = float(jax.jit(jnp.sum)(ones))
    print(f"sum {total} over {jax.process_count()} processes", flush=True)
    preempted = False
    with PreemptionGuard() as guard:
        for step in range(experiment.run.steps):
            if preempted := guard.requested(step):
                break
            time.sleep(0.05)
            if step == 5:
                print("step 5", flush=True)
    if index == 0:
        pathlib.Path(workdir).mkdir(parents=True, exist_ok=True)
        content = {"total": total, "code": str(code_version()), "preempted": preempted}
        (workdir / "result.json").write_text(json.dumps(content))
    if preempted:
        print(f"saved at step {step}", flush=True)
        sys.exit(143)


if __name__ == "__main__":
    run_command(job, Experiment, example="tests/launch/tiny_config.py", errors=(), in_step=True)
