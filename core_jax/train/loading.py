"""Watches what comes before the first step: a process that hangs while it loads is named."""

import pathlib

import jax

from core_jax.watchdog import HEARTBEATS, Watchdog


def watched_loading(workdir: pathlib.Path, hang_seconds: float) -> Watchdog:
    """Watches the loading of a training run, up to where `run_training` watches by itself.

    Those that are through already wait in a collective of `run_training`: by the watchdog there
    one that is still here is behind all others, however often it has moved.

    Args:
      workdir: of the run.
      hang_seconds: see `core_jax.train.loop.LoopConfig`.
    """
    return Watchdog(
        workdir / HEARTBEATS, seconds=hang_seconds, index=jax.process_index(),
        peers=range(jax.process_count()), place="loading the weights", before_others=True,
    )  # fmt: skip
