"""A training command in miniature, for tests that kill it: run_tiny.py WORKDIR STEPS PAUSE."""

import logging
import sys
import time

import jax
import numpy as np
import tiny_problem as tiny

from core_jax.train.loop import LoopConfig, run_training


def main(workdir, steps, pause):
    logging.disable(logging.WARNING)
    step, state, _ = tiny.setup(ema_decay=0.9)

    def make_batches(start):
        for batch in tiny.batches(start):
            time.sleep(pause)
            yield batch

    result = run_training(
        LoopConfig(total_steps=steps, log_every=1, save_every=3),
        state=state,
        step_fn=step,
        frozen=tiny.frozen(),
        make_batches=make_batches,
        workdir=workdir,
    )
    if not result.preempted:
        names = {f"x{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(result.state))}
        np.savez(f"{workdir}/final.npz", **names)
    print("preempted" if result.preempted else "finished", result.step, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
