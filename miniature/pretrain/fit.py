"""One small front of the training loop for networks that are trained from scratch."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from core_jax.train.loop import LoopConfig, run_training
from core_jax.train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from core_jax.train.run_record import RunRecord
from core_jax.train.state import init_state
from core_jax.train.step import make_train_step

Batch = Mapping[str, np.ndarray]


def index_batches(
    size: int, batch_size: int, *, seed: int, start_step: int
) -> Iterator[tuple[int, np.ndarray]]:
    """(step, rows) of an endless shuffled pass; a function of the step alone."""
    per_epoch = size // batch_size
    step = start_step
    while True:
        epoch, position = divmod(step, per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(size)
        for i in range(position, per_epoch):
            yield step, order[i * batch_size : (i + 1) * batch_size]
            step += 1


def fit(
    name: str,
    *,
    params: Any,
    loss: Callable,
    make_batches: Callable[[int], Iterator[Batch]],
    steps: int,
    learning_rate: float,
    workdir: pathlib.Path,
    frozen: Any = None,
    ema_decay: float | None = None,
    seed: int = 0,
    weight_decay: float = 0.01,
    warmup_steps: int = 100,
    optimizer_name: str = "adamw",
) -> Any:
    """Trains parameters, or continues where an interrupted call stopped.

    Returns:
      The trained parameters (their moving average where `ema_decay` is given), on the host.

    Raises:
      SystemExit: SIGTERM arrived; the state is saved.
    """
    config = OptimizerConfig(
        learning_rate=learning_rate, total_steps=steps, warmup_steps=min(warmup_steps, steps // 10),
        b2=0.99, weight_decay=weight_decay, min_ratio=0.02, name=optimizer_name,
    )  # fmt: skip
    schedule = make_schedule(config)
    optimizer = make_optimizer(config, schedule)
    step = make_train_step(loss, optimizer, schedule, ema_decay=ema_decay, seed=seed)
    print(
        f"{name}: {sum(x.size for x in jax.tree.leaves(params)):,} parameters, {steps} steps",
        flush=True,
    )
    result = run_training(
        LoopConfig(total_steps=steps, log_every=100, save_every=500, keep=1),
        state=init_state(params, optimizer, ema=ema_decay is not None),
        step_fn=step,
        frozen={} if frozen is None else frozen,
        make_batches=make_batches,
        workdir=str(workdir / name),
        record=RunRecord(fingerprint={"optimizer": dataclasses.asdict(config), "seed": seed}),
    )
    if result.preempted:
        raise SystemExit(1)
    state = result.state
    return jax.device_get(state.params if state.ema is None else state.ema)
