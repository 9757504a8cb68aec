"""Setting up and running a training job from an experiment."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from core_jax.data.pipeline import make_batches
from core_jax.data.sources import open_source
from core_jax.partition import split, tree_hash
from core_jax.sharding import check_batch, make_mesh
from core_jax.train.loading import watched_loading
from core_jax.train.loop import Hook, LoopConfig, TrainResult, run_training
from core_jax.train.placement import PlacedStep, place_step
from core_jax.train.run_record import INIT_FROM, RunRecord, decide_start
from core_jax.train.state import TrainState
from core_jax.train.workdir import save_experiment
from vlv_jax import networks as names
from vlv_jax import stage1, stage2
from vlv_jax.batches import make_transform, policy_of, views_of
from vlv_jax.experiment import Experiment
from vlv_jax.loading import Pieces, cast_frozen
from vlv_jax.networks import Networks
from vlv_jax.sample_sheets import has_sheet, make_sample_hook
from vlv_jax.workdir import assemble, is_export, trained_params, view_differences, weights_hash


def trainable_patterns(experiment: Experiment) -> tuple[str, ...]:
    """Which parameters are trained."""
    return experiment.trainable or (stage1 if experiment.stage == 1 else stage2).TRAINABLE


def needs_decoder(experiment: Experiment) -> bool:
    """Whether UNet and VAE are needed: for the loss, or for sample sheets."""
    return (
        experiment.stage == 1
        or experiment.captioning.reconstruction_weight > 0
        or experiment.run.sample_every > 0
    )


def make_loss(experiment: Experiment, networks: Networks) -> Callable:
    """The stage's loss."""
    if experiment.stage == 1:
        return stage1.make_loss(networks, experiment.denoising)
    return stage2.make_loss(networks, experiment.captioning, experiment.denoising)


def batch_keys(experiment: Experiment) -> tuple[str, ...]:
    """Which views of an image the loss reads."""
    if experiment.stage == 1 or experiment.captioning.reconstruction_weight > 0:
        return ("image", "florence_image")
    return ("florence_image",)


def training_batches(
    experiment: Experiment, pieces: Pieces, start_step: int
) -> Iterator[Mapping[str, Any]]:
    """Host batches from a step on; cached features where the config names a cache."""
    data = experiment.data
    captions = experiment.stage == 2
    if data.cache:
        from vlv_jax.feature_cache import cached_batches

        return cached_batches(experiment, pieces, start_step)
    transform = make_transform(
        views_of(data, pieces.processor),
        tokenizer=pieces.lm_tokenizer if captions else None,
        max_tokens=data.max_tokens,
        supervise_eos=experiment.captioning.supervise_eos,
        keep=batch_keys(experiment),
    )
    return make_batches(
        open_source(data.source),
        batch_size=data.batch_size,
        seed=experiment.run.seed,
        start_step=start_step,
        transform=transform,
        policy=policy_of(data, require_caption=captions),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=data.num_threads,
    )


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that a training run needs, on its devices.

    Attributes:
      step_fn: the jitted step.
      state: initial state.
      frozen: frozen parameters.
      networks, pieces: see vlv_jax.loading.
      sharding: of batches.
    """

    step_fn: Callable
    state: TrainState
    frozen: dict[str, Any]
    networks: Networks
    pieces: Pieces
    sharding: Any


def build_job(experiment: Experiment) -> Job:
    """Loads networks, splits them, and places everything on the config's mesh."""
    mesh = make_mesh(experiment.run.mesh)
    networks, params, pieces = assemble(
        experiment,
        with_decoder=needs_decoder(experiment),
        with_language_model=experiment.stage == 2,
        prefer_ema=True,
        mesh=mesh,
    )
    trainable, frozen = divide(experiment, params)
    placed = make_step(experiment, networks, trainable, frozen, mesh)
    frozen = jax.device_put(frozen, placed.frozen_shardings)
    state = placed.create_state(trainable)
    return Job(placed.step_fn, state, frozen, networks, pieces, placed.batch_sharding)


def divide(experiment: Experiment, params: Mapping[str, Any]) -> tuple[dict, dict]:
    """What is trained, and what is frozen in the precision it is held in.

    Args:
      experiment: the config.
      params: parameters by network.
    """
    trainable, frozen = split(params, trainable_patterns(experiment))
    frozen = cast_frozen(frozen, experiment.model)
    if experiment.data.cache:
        frozen = _without_towers(frozen, experiment)
    return trainable, frozen


def make_step(
    experiment: Experiment, networks: Networks, trainable: Any, frozen: Any, mesh: Any
) -> PlacedStep:
    """The jitted step and where everything lies; parameters may be shapes (`divide`)."""
    return place_step(
        make_loss(experiment, networks), trainable, frozen,
        mesh=mesh,
        optimizer=experiment.optimizer,
        grad_accum=experiment.run.grad_accum,
        compute_dtype=experiment.model.compute_dtype,
        ema_decay=experiment.run.ema_decay,
        seed=experiment.run.seed,
        keyed_by_example=True,
    )  # fmt: skip


def _without_towers(frozen: dict[str, Any], experiment: Experiment) -> dict[str, Any]:
    """With cached features the image tower is not needed, nor is the VAE in the loss."""
    if experiment.run.sample_every:
        return frozen
    florence = {k: v for k, v in frozen[names.FLORENCE2].items() if k == "language_model"}
    rest = {k: v for k, v in frozen.items() if k not in (names.FLORENCE2, names.VAE)}
    return rest | {names.FLORENCE2: florence}


def make_record(experiment: Experiment) -> RunRecord:
    """What must not change between a run's start and its resumption."""
    config = dataclasses.asdict(experiment)
    may_change = ("mesh", "log_every", "save_every", "sample_every", "keep", "hang_seconds")
    fixed = {k: v for k, v in config.items() if k not in ("evaluation", "sampling")}
    fixed["run"] = {k: v for k, v in config["run"].items() if k not in may_change}
    fixed["data"] = {k: v for k, v in config["data"].items() if k != "num_threads"}
    fixed["model"] = {k: v for k, v in config["model"].items() if k not in ("execution", *_PATHS)}
    hashes = {p: weights_hash(config["model"][p]) for p in _PATHS if config["model"][p]}
    if source := experiment.run.init_from:
        # The bridge and the towers of the run before are frozen here, in no checkpoint, and read
        # again at every start: that run must not have gone on meanwhile.
        path = pathlib.Path(source)
        hashes[INIT_FROM] = (
            weights_hash(path) if is_export(path) else tree_hash(trained_params(path))
        )
    return RunRecord(
        fingerprint=fixed,
        data_seed=experiment.run.seed,
        frozen_hashes=hashes,
        init_from=experiment.run.init_from or None,
        config=config,
    )


_PATHS = ("florence2", "diffusion", "language_model")


def train(
    experiment: Experiment,
    workdir: pathlib.Path,
    *,
    count_flops: Callable[[], float] | None = None,
) -> TrainResult:
    """Trains, or continues training, in a working directory.

    Args:
      experiment: the config.
      workdir: the directory.
      count_flops: tells the operations of a step over all devices, for the MFU.
    """
    check_batch(experiment.data.batch_size, make_mesh(experiment.run.mesh))
    with watched_loading(workdir, experiment.run.hang_seconds) as watchdog:
        watchdog.at("hashing the weights")
        record = make_record(experiment)
        start = decide_start(str(workdir), record)  # before anything is loaded or written
        if start == "warm" and jax.process_index() == 0:
            for line in view_differences(experiment):
                print(f"warning: the run in init_from was trained otherwise: {line}", flush=True)
        watchdog.at("loading the weights")
        job = build_job(experiment)
        watchdog.at("opening the examples")
        if jax.process_index() == 0:
            save_experiment(workdir, experiment)
        run = experiment.run
        hooks = []
        if run.sample_every:
            hook = make_sample_hook(experiment, job.networks, job.frozen, job.pieces, workdir)
            is_done = functools.partial(has_sheet, workdir)
            hooks.append(Hook(run.sample_every, hook, at_end=True, is_done=is_done))
    return run_training(
        LoopConfig(
            total_steps=run.steps, log_every=run.log_every, save_every=run.save_every,
            keep=run.keep, hang_seconds=run.hang_seconds, count_flops=count_flops,
        ),
        state=job.state,
        step_fn=job.step_fn,
        frozen=job.frozen,
        make_batches=lambda start: training_batches(experiment, job.pieces, start),
        workdir=str(workdir),
        hooks=hooks,
        record=record,
        batch_sharding=job.sharding,
    )  # fmt: skip
