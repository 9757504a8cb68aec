"""Checkpoints: Orbax v1, saved at intervals and on SIGTERM, restored onto any mesh.

A checkpoint holds the `TrainState` and nothing else. Frozen weights are named by their hashes in
run.json (`core_jax.train.run_record`); the data position and random keys follow from the step.
The newest checkpoints are kept, never the best: the newest is the one to resume from.
"""

import contextlib
import gc
import json
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from core_jax.files import storage_problem
from core_jax.partition import flatten, path_str, unflatten
from core_jax.sharding import abstract_like
from core_jax.train.errors import NonFiniteError, ResumeError
from core_jax.train.run_record import CHECKPOINT_DIR
from core_jax.train.state import TrainState

logger = logging.getLogger(__name__)
Tree = Any

BROKEN_DIR = "broken_checkpoints"
_MARKER = "_CHECKPOINT_METADATA"  # orbax dates it when all is written
_FIELDS = ("step", "params", "opt_state", "ema")


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last save.

    All processes call all methods, in the same order. A step that can't be read (a truncated
    file, say) is left out with a warning, and the next older one counts; once that is read, the
    broken one is moved to `broken_checkpoints/`.

    Args:
        workdir: the run's directory; checkpoints lie in `checkpoints/<step>`.
        every: interval of regular saves in steps.
        keep: number of newest checkpoints kept.
        keep_every: additionally keep every multiple of this many steps for ever.
    """

    def __init__(
        self, workdir: str, *, every: int = 1000, keep: int = 2, keep_every: int | None = None
    ) -> None:
        if every < 1 or keep < 1:
            raise ValueError(f"every={every} and keep={keep} must be at least 1")
        self.workdir = epath.Path(workdir)
        saving = ocp.training.save_decision_policies
        # The preemption policy stays in the list: without it nothing is saved on SIGTERM.
        self._saving: Any = saving.AnySavePolicy(
            [saving.FixedIntervalPolicy(every), saving.PreemptionCheckpointingPolicy()]
        )
        keeping = ocp.training.preservation_policies
        rules: list[Any] = [keeping.LatestN(keep)]
        if keep_every is not None:
            rules.append(keeping.EveryNSteps(keep_every))
        self._keeping: Any = keeping.AnyPreservationPolicy(rules)
        self._pending: Any = None
        self._checkpointer = self._open()

    def _open(self) -> ocp.training.Checkpointer:
        directory = _directory_of(self.workdir)
        return ocp.training.Checkpointer(
            directory,
            save_decision_policy=self._saving,
            preservation_policy=self._keeping,
            cleanup_tmp_directories=True,  # what a killed save left behind
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except Exception as error:
            # Don't hide the error that ended the run behind one of closing.
            if kind is None:
                raise
            told = storage_problem(error)
            logger.error(
                "closing the checkpoints of %s failed: %s", self.workdir, told, exc_info=not told
            )

    def close(self) -> None:
        """Waits for a save in progress and raises if it failed."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()

    def wait(self) -> None:
        """Waits for a save in progress and raises if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, ascending."""
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    def should_save(self, step: int) -> bool:
        """Whether the interval or a preemption asks for a save; ask once after each step."""
        return bool(self._checkpointer.should_save(step))

    def save(self, step: int, state: TrainState) -> bool:
        """Saves in the background; returns False if that step is saved already.

        Device buffers are copied before it returns, so the state may be donated afterwards.

        Raises:
            NonFiniteError: if the state has a NaN or an infinity; nothing is written.
            ValueError: if `state.step` is not `step`.
        """
        if step in self.steps():
            return False
        self.wait()
        if int(state.step) != step:
            raise ValueError(f"the state is at step {int(state.step)}, not at {step}: not saved")
        if bad := _non_finite(state):
            raise NonFiniteError(
                f"the state at step {step} is not finite and was not saved: {', '.join(bad)}",
                step=step,
            )
        self._pending = self._checkpointer.save_async(step, _as_dict(state), force=True)
        return True

    def restore(self, abstract_state: TrainState) -> TrainState | None:
        """Loads the newest whole checkpoint, or returns None where there is none at all.

        Args:
            abstract_state: shapes, dtypes and shardings of every leaf; the mesh may be another
                than the one it was saved on.

        Raises:
            ResumeError: if the newest readable checkpoint has other leaves, shapes or dtypes
                than `abstract_state`, or if there are checkpoints and none can be read.
        """
        if bare := [
            path_str(path)
            for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_state)
            if getattr(leaf, "sharding", None) is None
        ]:
            raise ValueError(f"restore needs a sharding for every leaf, missing for {bare[:5]}")
        broken: list[int] = []
        for step in reversed(self.steps()):
            found = self._try(step, abstract_state)
            if found is not None:
                # Only now: if nothing could be read, the fault may be the file system's.
                self._move_aside(broken)
                return found
            broken.append(step)
        if broken:
            raise ResumeError(
                f"none of the checkpoints {sorted(broken)} in {self.workdir} can be read; the "
                f"warnings above say why. To start anew, remove {CHECKPOINT_DIR}/ there"
            )
        return None

    def _try(self, step: int, abstract_state: TrainState) -> TrainState | None:
        path = self._checkpointer.directory / str(step)
        tree, error = None, None
        target = _as_dict(abstract_state)
        with _quiet_asyncio():
            try:
                problems = _differences(_metadata(path), target)
                if not problems:
                    tree = ocp.load(path, target)
            except Exception as caught:  # whatever a broken file makes TensorStore or json raise
                error, problems = caught, []
        if problems:
            raise ResumeError(
                f"checkpoint {path} does not fit what is being trained:\n  " + "\n  ".join(problems)
            )
        if not everywhere(tree is not None):
            reason = str(error).splitlines()[0][:300] if error else "another process failed"
            logger.warning(
                "checkpoint %s is damaged and is left out (%s: %s)",
                path,
                type(error).__name__,
                reason,
            )
            return None
        return TrainState(**{"ema": None, **cast(dict[str, Any], tree)})

    def _move_aside(self, steps: list[int]) -> None:
        """Frees the steps' names: training will come by them again and save."""
        if not steps:
            return
        self._checkpointer.close()
        if jax.process_index() == 0:
            target = self.workdir / BROKEN_DIR
            target.mkdir(parents=True, exist_ok=True)
            for step in steps:
                number = sum(path.name.split("-")[0] == str(step) for path in target.iterdir())
                source = self.workdir / CHECKPOINT_DIR / str(step)
                source.rename(target / f"{step}-{number}")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("broken checkpoints moved")
        self._checkpointer = self._open()


def load_params(
    workdir: str,
    *,
    ema: bool = False,
    shardings: jax.sharding.Sharding | Callable[[Tree], Tree] | None = None,
) -> Tree:
    """Reads only the trainable parameters (or their moving average) of a run.

    Args:
        workdir: the run's directory; its newest readable checkpoint counts. Nothing in it is
            changed.
        ema: read the moving average instead.
        shardings: one sharding for all leaves, or a function from the abstract tree to a tree of
            shardings; by default the first local device.

    Returns:
        Nested dict of arrays, as they were saved.

    Raises:
        FileNotFoundError: if there is no readable checkpoint.
        ValueError: if the run kept no moving average and `ema` is set.
    """
    directory = _directory_of(workdir)
    names = [path.name for path in directory.iterdir()] if directory.exists() else []
    field = "ema" if ema else "params"
    for step in sorted((int(name) for name in names if name.isdigit()), reverse=True):
        path = directory / str(step)
        with _quiet_asyncio():
            try:
                saved = _metadata(path)
                has_field = bool(saved.get(field))
                tree = _load_field(path, saved, field, shardings) if has_field else None
            except Exception as error:  # see Checkpoints._try
                logger.warning("checkpoint %s is damaged and is left out (%s)", path, error)
                continue
        if tree is None:
            raise ValueError(f"{path} has no {field}; the run was made without a moving average")
        return tree
    raise FileNotFoundError(f"{workdir} has no readable checkpoint under {CHECKPOINT_DIR}/")


def _directory_of(workdir: epath.PathLike) -> epath.Path:
    """Where a run's checkpoints are; orbax reads relative paths as damaged checkpoints.

    An address such as gs://bucket/run is absolute, but `resolve` takes it for a relative path.
    """
    directory = epath.Path(workdir) / CHECKPOINT_DIR
    return directory if "://" in os.fspath(directory) else directory.resolve()


def _metadata(path: epath.Path) -> Tree:
    """Shapes and dtypes of a checkpoint.

    Raises:
        OSError: it was never committed, or its files are damaged.
    """
    # Orbax reads what it finds, also of a folder that was copied in part.
    marker = json.loads((path / _MARKER).read_text())
    if not marker.get("commit_timestamp_nsecs"):
        raise OSError(f"{_MARKER} does not say that the save was finished")
    metadata = ocp.metadata(path).metadata
    if not metadata:  # orbax logs what is wrong with the files and returns None
        raise OSError("its metadata cannot be read")
    return metadata


def _load_field(path: epath.Path, saved: Tree, field: str, shardings: Any) -> Tree:
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved[field])
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    elif callable(shardings):
        shardings = shardings(abstract)
    target = jax.tree.map(lambda _: ocp.PLACEHOLDER, saved)
    return ocp.load(path, {**target, field: abstract_like(abstract, shardings)})[field]


def warm_start(params: Tree, source: Tree, *, keep: tuple[str, ...] = ()) -> Tree:
    """Returns `params` with the leaves of `source`, in the dtype and sharding of `params`.

    Args:
        params: freshly initialised trainable parameters.
        source: parameters of another run, say from `load_params`.
        keep: paths, or prefixes of paths, of `params` that `source` is allowed to lack.

    Raises:
        ValueError: listing every leaf of `source` that `params` lacks, every leaf of `params`
            that `source` lacks and `keep` doesn't name, and every difference of shape.
    """
    ours, theirs = flatten(params), flatten(source)

    def kept(path: str) -> bool:
        return any(path == prefix or path.startswith(prefix + "/") for prefix in keep)

    problems = [f"{path}: not a parameter here" for path in theirs if path not in ours]
    problems += [f"{p}: not in the source" for p in ours if p not in theirs and not kept(p)]
    problems += [
        f"{path}: shape {theirs[path].shape} in the source, {leaf.shape} here"
        for path, leaf in ours.items()
        if path in theirs and theirs[path].shape != leaf.shape
    ]
    if problems:
        raise ValueError("warm start does not fit:\n  " + "\n  ".join(sorted(problems)))

    def one(path: str, leaf: Any) -> Any:
        if path not in theirs:
            return leaf
        sharding = getattr(leaf, "sharding", None)
        return jax.device_put(jnp.asarray(theirs[path], leaf.dtype), sharding)

    return unflatten({path: one(path, leaf) for path, leaf in ours.items()})


def _as_dict(state: TrainState) -> dict[str, Any]:
    fields = {name: getattr(state, name) for name in _FIELDS}
    return {name: value for name, value in fields.items() if value is not None}


@jax.jit
def _finite_flags(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.isfinite(leaf).all() for leaf in leaves]


def _non_finite(state: TrainState) -> list[str]:
    """Paths of floating leaves with a NaN or an infinity."""
    leaves = {
        path_str(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(_as_dict(state))
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    flags = jax.device_get(_finite_flags(list(leaves.values())))
    return [path for path, flag in zip(leaves, flags, strict=True) if not flag]


def _differences(saved: Tree, wanted: Tree) -> list[str]:
    """What differs between a checkpoint's metadata and an abstract state, in words."""

    def described(tree: Tree) -> dict[str, str]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {path_str(p): f"{x.dtype}{list(x.shape)}" for p, x in leaves}

    old, new = described(saved), described(wanted)
    return [
        f"{path}: {old.get(path, 'absent')} in the checkpoint, {new.get(path, 'absent')} here"
        for path in sorted(old.keys() | new.keys())
        if old.get(path) != new.get(path)
    ]


def everywhere(flag: bool) -> bool:
    """Whether the flag is set in every process."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(jnp.asarray(flag)).all())


@contextlib.contextmanager
def _quiet_asyncio() -> Iterator[None]:
    """One failed read leaves dozens of cancelled tasks, each of which would log a page."""
    noisy = logging.getLogger("asyncio")
    level = noisy.level
    noisy.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        gc.collect()
        noisy.setLevel(level)
