"""The host's side of training: feed batches, log, save, stop.

The device never waits for the host: batch n+1 is put on the mesh while step n runs, and the
metrics of step n are fetched after step n+1 was dispatched. Only saves and hooks, which need the
state itself, wait.
"""

import dataclasses
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from core_jax.train.checkpoint import Checkpoints, everywhere
from core_jax.train.hardware import compiler_flops, peak_flops
from core_jax.train.metrics import MetricWriter, MultiWriter, default_writers
from core_jax.train.nonfinite import non_finite_error
from core_jax.train.preemption import PreemptionGuard
from core_jax.train.run_record import RunRecord, decide_start, write_record
from core_jax.train.skipped import SkippedList
from core_jax.train.state import TrainState
from core_jax.watchdog import HEARTBEATS, Watchdog

logger = logging.getLogger(__name__)
Tree = Any
Batch = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long to train and how often to do what; all numbers are steps.

    Attributes:
        total_steps: updates in the whole run, resumptions included.
        log_every: interval of the metric writers; values are means over the interval.
        save_every: interval of checkpoints; one more is saved at the end and on SIGTERM.
        keep: number of newest checkpoints kept.
        keep_every: keep every multiple of this for ever, or None.
        count_flops: tells the arithmetic of one step over all devices, for the MFU; called once,
            and only where the devices' peak is known. None, or one that fails, leaves it to the
            compiler, which counts the body of a scan (over layers or micro-batches) once and so
            gives a lower bound.
        hang_seconds: after which a process that does not come further is named, and all end
            (`core_jax.watchdog`); 0 waits for ever.
    """

    total_steps: int
    log_every: int = 20
    save_every: int = 1000
    keep: int = 2
    keep_every: int | None = None
    count_flops: Callable[[], float] | None = None
    hang_seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Hook:
    """Something to do between steps, a sample sheet or an evaluation.

    Attributes:
        every: interval in steps.
        fn: `(step, state) -> scalars to write, or None`. The state is donated to the next step:
            keep no reference to it.
        at_start: also before the first step of a new run.
        at_end: also after the last step, whatever its number.
        is_done: whether what it makes of a step is there already. A run that was stopped between
            a save and its hooks makes up for those that say no when it goes on.
    """

    every: int
    fn: Callable[[int, TrainState], Mapping[str, float] | None]
    at_start: bool = False
    at_end: bool = True
    is_done: Callable[[int], bool] | None = None


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a call of `run_training` ended.

    Attributes:
        state: the last state.
        step: its number.
        preempted: whether SIGTERM ended it before `total_steps`.
    """

    state: TrainState
    step: int
    preempted: bool


def run_training(
    config: LoopConfig,
    *,
    state: TrainState,
    step_fn: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
    frozen: Tree,
    make_batches: Callable[[int], Iterator[Batch]],
    workdir: str,
    writers: MetricWriter | None = None,
    hooks: Sequence[Hook] = (),
    record: RunRecord | None = None,
    batch_sharding: Sharding | None = None,
) -> TrainResult:
    """Trains from the newest checkpoint of `workdir`, or from `state`, to `total_steps`.

    Args:
        config: see `LoopConfig`.
        state: initial state, which is consumed; shapes with shardings are enough where there is
            a checkpoint.
        step_fn: result of `jit_train_step`, or a plain step.
        frozen: frozen parameters on their devices.
        make_batches: `start_step -> iterator` of host batches, dicts of numpy arrays whose
            first dimension is this process's share of the batch. An entry "ids" (strings or
            numbers, one an example) stays on the host and names the examples in errors. Where the
            iterator has an attribute `bad` (`core_jax.data.bad.BadLog`), the examples that it
            skipped are counted in the metrics and listed in `workdir`.
        workdir: directory of checkpoints, run.json and metrics.
        writers: by default metrics.jsonl, TensorBoard and a progress line.
        hooks: see `Hook`.
        record: what the run is made from; a run that was made from something else is refused.
        batch_sharding: sharding of batch arrays (scalars are replicated); None puts them on the
            default device.

    Returns:
        The last state. After SIGTERM it is saved, and the caller should exit.

    Raises:
        NonFiniteError: naming the step and the batch; nothing of that step was saved.
        ResumeError: see `core_jax.train.run_record`.
        RuntimeError: if the batches end before `total_steps`.
    """
    record = RunRecord() if record is None else record
    writers = default_writers(workdir) if writers is None else writers
    if not isinstance(writers, MultiWriter):
        writers = MultiWriter([writers])
    start_kind = decide_start(workdir, record)
    watchdog = Watchdog(
        epath.Path(workdir) / HEARTBEATS, seconds=config.hang_seconds,
        index=jax.process_index(), peers=range(jax.process_count()),
    )  # fmt: skip
    with (
        watchdog,
        PreemptionGuard() as guard,
        Checkpoints(
            workdir, every=config.save_every, keep=config.keep, keep_every=config.keep_every
        ) as checkpoints,
    ):
        if start_kind == "resume":
            watchdog.at("reading the checkpoint")
            state = _restore(checkpoints, state)
        elif isinstance(state.step, jax.ShapeDtypeStruct):
            raise ValueError(f"{workdir} has no checkpoint: the state must be given in full")
        start = int(state.step)
        write_record(workdir, record, resumed_at=start if start_kind == "resume" else None)
        loop = _Loop(
            config, step_fn, frozen, writers, hooks, batch_sharding, workdir, watchdog
        )  # fmt: skip
        try:
            writers.start(start, config.total_steps)
            return loop.run(state, start, make_batches, checkpoints, guard)
        finally:
            loop.skipped.write()
            writers.close()


def _restore(checkpoints: Checkpoints, state: TrainState) -> TrainState:
    """Loads the newest checkpoint in the shardings of `state`, whose own buffers are freed."""
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    for leaf in jax.tree.leaves(state):
        if isinstance(leaf, jax.Array):
            leaf.delete()
    restored = checkpoints.restore(abstract)
    if restored is None:
        raise RuntimeError(f"the checkpoints of {checkpoints.workdir} vanished while starting")
    return restored


class _Loop:
    """The mutable part of `run_training`: timers, the pending metrics, compiled steps."""

    def __init__(
        self,
        config: LoopConfig,
        step_fn: Any,
        frozen: Tree,
        writers: MultiWriter,
        hooks: Sequence[Hook],
        batch_sharding: Sharding | None,
        workdir: str,
        watchdog: Watchdog,
    ) -> None:
        self.watchdog = watchdog
        self.config, self.frozen, self.writers, self.hooks = config, frozen, writers, hooks
        self.step_fn = step_fn if hasattr(step_fn, "lower") else jax.jit(step_fn, donate_argnums=0)
        self.batch_sharding, self.workdir = batch_sharding, workdir
        self.num_devices = 1 if batch_sharding is None else len(batch_sharding.device_set)
        self.skipped = SkippedList(workdir)
        self.compiled: dict[Any, Any] = {}
        self.flops: float | None = None
        self.pending: tuple[int, dict[str, jax.Array], Any, int] | None = None
        self._reset_window()

    def _reset_window(self) -> None:
        self.sums: dict[str, float] = {}
        self.count = self.images = 0
        self.data_wait = self.paused = 0.0
        self.window_start = time.perf_counter()

    def run(
        self,
        state: TrainState,
        start: int,
        make_batches: Callable[[int], Iterator[Batch]],
        checkpoints: Checkpoints,
        guard: PreemptionGuard,
    ) -> TrainResult:
        """The loop itself."""
        total = self.config.total_steps
        if start:
            self._run_hooks(start, state, self._missed_hooks(start))
        if start >= total:
            logger.warning("%s is already at step %d of %d", self.workdir, start, total)
            return TrainResult(state, start, preempted=False)
        if start == 0:
            self._run_hooks(0, state, [hook for hook in self.hooks if hook.at_start])
        batches = make_batches(start)
        self.skipped.watch(batches)
        batch, ids = self._next(batches, start)
        for step in range(start, total):
            done = step + 1
            self.watchdog.at(f"step {step}")
            state, metrics = self._dispatch(state, batch)
            in_flight = (step, metrics, ids, _num_examples(batch))
            if done < total:
                began = time.perf_counter()
                batch, ids = self._next(batches, done)
                loss: Any = metrics["loss"]
                if loss.is_ready():  # else the device was busy all along
                    self.data_wait += time.perf_counter() - began
            self._flush()
            self.pending = in_flight
            stop = guard.requested(done)
            due_save = checkpoints.should_save(done) or stop or done == total
            due_hooks = self._due_hooks(done)
            if due_save or due_hooks:
                # A step that went wrong must be known before anything is made of its state.
                self._flush()
            if due_save:
                self.watchdog.at(f"saving step {done}")
                # A run that goes on from here doesn't meet them again, nor logs its steps again.
                self.skipped.write()
                self.writers.sync()
                with _Pause(self):
                    checkpoints.save(done, state)
            self._run_hooks(done, state, due_hooks)
            if stop:
                self._say_preempted(done)
                self.watchdog.at(f"waiting for the save of step {done}")
                checkpoints.wait()
                return TrainResult(state, done, preempted=done < total)
        return TrainResult(state, total, preempted=False)

    def _next(self, batches: Iterator[Batch], step: int) -> tuple[Tree, Any]:
        """The next host batch, on the mesh, and its ids."""
        self.watchdog.at(f"loading the batch of step {step}")
        try:
            batch = dict(next(batches))
        except StopIteration:
            raise RuntimeError(
                f"the data ended before step {step} of {self.config.total_steps}; make_batches "
                "must repeat its source"
            ) from None
        ids = batch.pop("ids", None)
        return jax.tree.map(self._put, batch), ids

    def _put(self, x: Any) -> jax.Array:
        x = np.asarray(x)
        sharding = self.batch_sharding
        if sharding is None:
            return jax.device_put(x)
        if x.ndim == 0 and isinstance(sharding, NamedSharding):
            sharding = NamedSharding(sharding.mesh, PartitionSpec())
        # With the shape left to jax, rows that several processes hold would count once.
        shape = (x.shape[0] * jax.process_count(), *x.shape[1:]) if x.ndim else ()
        return jax.make_array_from_process_local_data(sharding, x, shape)

    def _dispatch(self, state: TrainState, batch: Tree) -> tuple[TrainState, dict[str, jax.Array]]:
        """Runs the step compiled for this batch's shapes, compiling it on the first."""
        key = tuple((x.shape, x.dtype) for x in jax.tree.leaves(batch))
        if key not in self.compiled:
            with _Pause(self):
                began = time.perf_counter()
                self.compiled[key] = self.step_fn.lower(state, self.frozen, batch).compile()
                logger.info("compiled the step in %.1f s", time.perf_counter() - began)
                if self.flops is None and peak_flops():
                    self.flops = self._step_flops(self.compiled[key])
        return self.compiled[key](state, self.frozen, batch)

    def _step_flops(self, compiled: Any) -> float | None:
        """Of one step over all devices."""
        if self.config.count_flops is not None:
            try:
                return self.config.count_flops()
            except Exception as error:  # a figure of the log must not stop a run
                logger.warning("the MFU is a lower bound, by the compiler's count: %s", error)
        per_device = compiler_flops(compiled)
        return per_device and per_device * self.num_devices

    def _flush(self) -> None:
        """Fetches the pending metrics, checks them, and writes when an interval is full."""
        if self.pending is None:
            return
        (step, metrics, ids, num_examples), self.pending = self.pending, None
        self.watchdog.at(f"the devices' result of step {step}")
        values = {name: float(x) for name, x in jax.device_get(metrics).items()}
        if values["nonfinite"]:
            raise non_finite_error(self.workdir, step, values, ids)
        self.count += 1
        self.images += num_examples
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        done = step + 1
        if done % self.config.log_every == 0 or done == self.config.total_steps:
            self.writers.write(done, self._summary(values))
            self.skipped.write()
            self._reset_window()

    def _summary(self, last: Mapping[str, float]) -> dict[str, float]:
        out = {name: total / self.count for name, total in self.sums.items()}
        out["lr"] = last["lr"]
        del out["nonfinite"]
        elapsed = max(time.perf_counter() - self.window_start - self.paused, 1e-9)
        out["steps_per_second"] = self.count / elapsed
        out["images_per_second"] = self.images * jax.process_count() / elapsed
        out["data_wait"] = min(self.data_wait / elapsed, 1.0)
        out |= self.skipped.metrics()
        peak = peak_flops()
        if self.flops and peak:
            out["mfu"] = self.flops * self.count / (elapsed * peak * self.num_devices)
        return out

    def _due_hooks(self, done: int) -> list[Hook]:
        is_last = done == self.config.total_steps
        return [h for h in self.hooks if done % h.every == 0 or (is_last and h.at_end)]

    def _missed_hooks(self, step: int) -> list[Hook]:
        """Due at a step that was saved, and never run; all processes run them, or none."""
        due = [hook for hook in self._due_hooks(step) if hook.is_done is not None]
        return [hook for hook in due if hook.is_done and not everywhere(hook.is_done(step))]

    def _run_hooks(self, step: int, state: TrainState, hooks: Sequence[Hook]) -> None:
        with _Pause(self):
            for hook in hooks:
                self.watchdog.at(f"a sample sheet or evaluation after step {step}")
                if scalars := hook.fn(step, state):
                    self.writers.write(step, scalars)

    def _say_preempted(self, step: int) -> None:
        if jax.process_index() == 0:
            print(
                f"\nSIGTERM: saving step {step} in {self.workdir}; the same command continues it",
                file=sys.stderr,
                flush=True,
            )


class _Pause:
    """Time spent inside doesn't count as training."""

    def __init__(self, loop: _Loop) -> None:
        self._loop = loop

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._loop.paused += time.perf_counter() - self._began


def _num_examples(batch: Tree) -> int:
    """Examples of this process in a batch: global rows over the number of processes."""
    rows = [x.shape[0] for x in jax.tree.leaves(batch) if x.ndim]
    return rows[0] // jax.process_count() if rows else 0
