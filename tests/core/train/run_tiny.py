"""A training command in miniature, for tests that kill it.

run_tiny.py WORKDIR STEPS PAUSE [PROCESS PROCESSES PORT [HANG_SECONDS]]

With HANG_SECONDS the last process's loader hangs at batch 4, and the watchdog waits that long.
"""

import logging
import sys
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from core_jax.sharding import DEFAULT_RULES, batch_sharding, make_mesh, param_shardings
from core_jax.train.loop import LoopConfig, run_training
from core_jax.train.state import create_state
from core_jax.train.step import jit_train_step
from tests.core.train import tiny_problem as tiny

HANGS_AT = 4


def read_a_mount_that_is_gone():
    time.sleep(600)


def main(workdir, steps, pause, hang_seconds=0.0):
    logging.disable(logging.WARNING)
    mesh = make_mesh({"fsdp": -1})
    step, _, optimizer = tiny.setup(ema_decay=0.9)
    shardings = param_shardings(tiny.params(), tiny.PARAM_AXES, DEFAULT_RULES, mesh)
    state, state_shardings = create_state(
        tiny.params(), optimizer, param_shardings=shardings, mesh=mesh, ema=True
    )
    rows = batch_sharding(mesh)

    def make_batches(start):
        here, all_ = jax.process_index(), jax.process_count()
        for number, batch in enumerate(tiny.batches(start), start):
            time.sleep(pause)
            if hang_seconds and here == all_ - 1 and number == HANGS_AT:
                read_a_mount_that_is_gone()
            yield {k: np.split(v, all_)[here] for k, v in batch.items()}

    result = run_training(
        LoopConfig(total_steps=steps, log_every=1, save_every=3, hang_seconds=hang_seconds),
        state=state,
        step_fn=jit_train_step(step, state_shardings, None, rows, mesh),
        frozen=tiny.frozen(),
        make_batches=make_batches,
        workdir=workdir,
        batch_sharding=rows,
    )
    if not result.preempted:
        state = multihost_utils.process_allgather(result.state, tiled=True)
        if jax.process_index() == 0:
            names = {f"x{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(state))}
            np.savez(f"{workdir}/final.npz", **names)
    print("preempted" if result.preempted else "finished", result.step, flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 4:
        index, count, port = map(int, sys.argv[4:7])
        jax.distributed.initialize(f"localhost:{port}", count, index)
    main(sys.argv[1], int(sys.argv[2]), *map(float, [sys.argv[3], *sys.argv[7:]]))
