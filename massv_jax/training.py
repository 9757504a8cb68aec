"""Setting up and running either phase of training from an experiment."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from core_jax.config import ConfigError
from core_jax.data.gemma3_processor import Gemma3Processor
from core_jax.data.llava_exclude import read_exclusions, without_images
from core_jax.data.pipeline import BatchIterator, make_batches
from core_jax.data.qwen2_5_vl_processor import Qwen2_5_VLProcessor
from core_jax.data.sources import Source, open_source
from core_jax.models import load_model
from core_jax.models.gemma3 import Gemma3Config
from core_jax.models.qwen2_5_vl import Qwen2_5_VLConfig
from core_jax.partition import cast_floating, split
from core_jax.sharding import check_batch, make_mesh
from core_jax.train.loading import watched_loading
from core_jax.train.loop import LoopConfig, TrainResult, run_training
from core_jax.train.placement import PlacedStep, place_step
from core_jax.train.run_record import RunRecord, decide_start
from core_jax.train.state import TrainState
from core_jax.train.workdir import save_experiment
from massv_jax import phase1, phase2
from massv_jax.answers import AnswerSource
from massv_jax.batches import RowLog, RowMaker, check_supervision, policy_of
from massv_jax.binding import Binding, weight_hashes
from massv_jax.experiment import Experiment
from massv_jax.loading import TARGET_MERGER, DrafterParts, load_tower, prefix_target
from massv_jax.phase2 import TARGET, TOWER, Teacher
from massv_jax.workdir import TARGET_BINDING, assemble


def trainable_patterns(experiment: Experiment, kind: str) -> tuple[str, ...]:
    """Which parameters are trained.

    Raises:
      ConfigError: the experiment trains nothing.
    """
    if experiment.trainable:
        return experiment.trainable
    if experiment.task == "phase1":
        return phase1.TRAINABLE
    if experiment.task == "phase2":
        return phase2.TRAINABLE_TEXT if kind == "text" else phase2.TRAINABLE
    raise ConfigError(
        f"a config of the task {experiment.task!r} trains nothing; use massv_phase1 or massv_phase2"
    )


def open_training_source(experiment: Experiment, binding: Binding) -> Source:
    """Conversations without the excluded images."""
    data = experiment.data
    if data.answers:
        source: Source = AnswerSource(
            data.answers, images=data.answer_images, target=binding.weights,
            labels=experiment.loss.ce > 0,
        )  # fmt: skip
    else:
        source = open_source(data.source)
    if data.exclude:
        source, left_out = without_images(source, read_exclusions(data.exclude))
        if jax.process_index() == 0:
            print(f"{left_out} examples show excluded images; {len(source)} are left", flush=True)
    return source


def make_rows(experiment: Experiment, parts: DrafterParts, processor: Any) -> RowMaker:
    """How an experiment's examples become rows."""
    loss = experiment.loss
    return RowMaker(
        parts.drafter.config, experiment.data, processor,
        with_target=loss.teacher == "target",
        top_k=loss.top_k if loss.teacher == "stored" else 0,
        image_dtype=experiment.model.frozen_dtype,
    )  # fmt: skip


def load_frontend(experiment: Experiment, target_config: Any) -> Any:
    """The target's preprocessing, within the data config's pixel limits."""
    path, data = experiment.model.target, experiment.data
    if isinstance(target_config, Gemma3Config):
        return Gemma3Processor.from_pretrained(path, target_config)
    if not isinstance(target_config, Qwen2_5_VLConfig):
        return prefix_target(str(pathlib.Path(path))).frontend
    processor = Qwen2_5_VLProcessor.from_pretrained(path, target_config)
    limits = {k: v for k in ("min_pixels", "max_pixels") if (v := getattr(data, k))}
    images = dataclasses.replace(processor.image_processor, **limits)
    return dataclasses.replace(processor, image_processor=images)


def training_batches(
    experiment: Experiment, source: Source, rows: RowMaker, start_step: int
) -> BatchIterator:
    """Host batches from a step on."""
    return make_batches(
        source,
        batch_size=experiment.data.batch_size,
        seed=experiment.run.seed,
        start_step=start_step,
        transform=rows.transform(),
        policy=policy_of(experiment.data),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=experiment.data.num_threads,
    )


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that a training run needs, on its devices.

    Attributes:
      step_fn: the jitted step.
      state: initial state.
      frozen: frozen parameters: the tower, the teacher's, what of the drafter is not trained.
      parts: the drafter that the run starts from.
      processor: the target's preprocessing.
      sharding: of batches.
    """

    step_fn: Callable
    state: TrainState
    frozen: dict[str, Any]
    parts: DrafterParts
    processor: Any
    sharding: Any


def build_job(experiment: Experiment) -> Job:
    """Loads the networks, splits them, and places everything on the config's mesh."""
    mesh = make_mesh(experiment.run.mesh)
    check_batch(experiment.data.batch_size, mesh)
    parts = assemble(experiment, mesh=mesh)
    config = parts.drafter.config
    trainable, frozen = split(parts.params, trainable_patterns(experiment, config.kind))
    extra, encode, teacher = frozen_networks(experiment, parts, mesh)
    frozen = cast_floating({**frozen, **extra}, experiment.model.frozen_dtype)
    loss = phase2.make_loss(parts.drafter, experiment.loss, teacher=teacher, encode=encode)
    placed = make_step(experiment, loss, trainable, frozen, mesh)
    frozen = jax.device_put(frozen, placed.frozen_shardings)
    if TARGET_MERGER in frozen and TARGET in frozen:  # the same weights: on the devices once
        frozen[TARGET]["merger"] = frozen[TARGET_MERGER]
    # What a checkpoint gave lies on one device.
    state = placed.create_state(jax.device_put(trainable, placed.shardings.params))
    processor = load_frontend(experiment, config.target)
    prefix_target.cache_clear()  # its arrays: what is trained with is in `frozen`
    return Job(placed.step_fn, state, frozen, parts, processor, placed.batch_sharding)


def make_step(
    experiment: Experiment, loss: Callable, trainable: Any, frozen: Any, mesh: Any
) -> PlacedStep:
    """The jitted step and where everything lies; parameters may be shapes."""
    return place_step(
        loss, trainable, frozen,
        mesh=mesh,
        optimizer=experiment.optimizer,
        grad_accum=experiment.run.grad_accum,
        compute_dtype=experiment.model.compute_dtype,
        ema_decay=experiment.run.ema_decay,
        seed=experiment.run.seed,
    )  # fmt: skip


def frozen_networks(
    experiment: Experiment, parts: DrafterParts, mesh: Any
) -> tuple[dict[str, Any], Any, Teacher | None]:
    """The tower (and the teacher's parameters), how a tower of another kind runs, the teacher."""
    path, config = pathlib.Path(experiment.model.target), parts.drafter.config
    asks = experiment.loss.teacher == "target"
    if not isinstance(config.target, Gemma3Config | Qwen2_5_VLConfig):
        if asks:
            raise ConfigError("loss.teacher='target' goes with Qwen2.5-VL and Gemma 3 targets")
        if config.kind == "text":
            return {}, None, None
        target = prefix_target(str(path))
        tower = {k: v for k, v in target.params.items() if k != "language_model"}
        return {TOWER: tower}, target.decoder.encode_images, None
    extra: dict[str, Any] = {}
    # At once in the type that they are kept in: not first in the file's, and then in both.
    options = {"mesh": mesh, "dtype": experiment.model.frozen_dtype}
    if config.kind != "text" or asks:
        extra[TOWER] = load_tower(path, **options)
    teacher = None
    if asks:
        own = config.kind != "mlp"  # such a drafter has the merger already
        extra[TARGET] = load_teacher(path, config.target, with_merger=own, **options)
        teacher = Teacher(config.target, experiment.model.execution)
    return extra, None, teacher


def load_teacher(
    path: pathlib.Path, config: Any, *, with_merger: bool = True, **options: Any
) -> dict[str, Any]:
    """The target's language model and projector; its tower is the drafter's.

    Args:
      path: the target's directory.
      config: its configuration.
      with_merger: also the merger of a Qwen2.5-VL.
      **options: of `load_model`.
    """
    if isinstance(config, Gemma3Config):
        patterns = (r"multi_modal_projector/.*", r"language_model/.*")
        return load_model(path, only=patterns, **options)[1]
    patterns = (r"language_model/.*", *([r"visual/merger/.*"] if with_merger else []))
    _, params = load_model(path, only=patterns, **options)
    merger = {"merger": params["visual"]["merger"]} if with_merger else {}
    return {**merger, "language_model": params["language_model"]}


_UNUSED = ("decoding", "evaluation", "distill")
_MAY_CHANGE = ("mesh", "log_every", "save_every", "keep", "hang_seconds")
_PATHS = ("target", "language_model", "drafter")


def make_record(experiment: Experiment, binding: Binding) -> RunRecord:
    """What must not change between a run's start and its resumption."""
    config = dataclasses.asdict(experiment)
    fixed = {k: v for k, v in config.items() if k not in _UNUSED}
    fixed["run"] = {k: v for k, v in config["run"].items() if k not in _MAY_CHANGE}
    fixed["data"] = {k: v for k, v in config["data"].items() if k != "num_threads"}
    fixed["model"] = {k: v for k, v in config["model"].items() if k not in ("execution", *_PATHS)}
    return RunRecord(
        fingerprint=fixed,
        data_seed=experiment.run.seed,
        frozen_hashes={
            "target": binding.weights,
            "language_model": weight_hashes(pathlib.Path(experiment.model.language_model))[0],
        },
        init_from=experiment.run.init_from or None,
        config=config,
        extra={TARGET_BINDING: dataclasses.asdict(binding)},
    )


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
    with watched_loading(workdir, experiment.run.hang_seconds) as watchdog:
        job = build_job(experiment)
        # What is trained is in the state: the weights that it began with would be there twice.
        job = dataclasses.replace(job, parts=dataclasses.replace(job.parts, params={}))
        binding = job.parts.binding
        watchdog.at("opening the examples")
        source = open_training_source(experiment, binding)
        rows = make_rows(experiment, job.parts, job.processor)
        record = make_record(experiment, binding)
        decide_start(str(workdir), record)  # before anything is written
        if jax.process_index() == 0:
            save_experiment(workdir, experiment)
            print(_first_example(source, rows), flush=True)
    run = experiment.run

    result = run_training(
        LoopConfig(
            total_steps=run.steps, log_every=run.log_every, save_every=run.save_every,
            keep=run.keep, hang_seconds=run.hang_seconds, count_flops=count_flops,
        ),
        state=job.state,
        step_fn=job.step_fn,
        frozen=job.frozen,
        make_batches=lambda start: _CheckedBatches(
            training_batches(experiment, source, rows, start), rows.log
        ),
        workdir=str(workdir),
        record=record,
        batch_sharding=job.sharding,
    )  # fmt: skip
    if rows.log.faults or rows.log.refused:
        print(f"mended: {dict(rows.log.faults)}; refused: {dict(rows.log.refused)}", flush=True)
    return result


class _CheckedBatches(Iterator[Mapping[str, Any]]):
    """Batches, of which the first must have something that is learned.

    Attributes:
      bad: the examples that were skipped.
    """

    def __init__(self, batches: BatchIterator, log: RowLog):
        self._batches, self._log = batches, log
        self.bad = batches.bad
        self._checked = False

    def __next__(self) -> Mapping[str, Any]:
        batch = next(self._batches)
        if not self._checked:
            check_supervision(batch, self._log)
            self._checked = True
        return batch


def _first_example(source: Source, rows: RowMaker) -> str:
    """The first example that can be used, with what is learned in [[ ]]."""
    from core_jax.data.images import BadImage

    for index in range(min(len(source), 32)):
        try:
            shown = rows.show(source[index])
        except (BadImage, ValueError):
            continue
        return f"example {source[index].id}; what is learned is in [[ ]]:\n{shown}"
    return "none of the first 32 examples can be used; the run will say why"
