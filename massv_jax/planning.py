"""A training job as shapes: the very step that `massv_jax.training` runs, without a weight.

Targets and language models whose directories are not on this machine come from presets by name
(core_jax.models.presets).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from core_jax.config import ConfigError
from core_jax.models.gemma3 import Gemma3Config
from core_jax.models.presets import abstract_model, find_config
from core_jax.models.qwen2_5_vl import Qwen2_5_VLConfig
from core_jax.partition import cast_floating, split
from core_jax.sharding import make_mesh
from core_jax.train.placement import AbstractJob
from massv_jax import phase2
from massv_jax.drafter import LANGUAGE_MODEL, PROJECTOR, Drafter
from massv_jax.drafter_config import DrafterConfig
from massv_jax.experiment import Experiment
from massv_jax.loading import TARGET_MERGER
from massv_jax.phase2 import TARGET, TOWER, Teacher
from massv_jax.projector import init_projector
from massv_jax.training import make_step, trainable_patterns

Shapes = dict[str, jax.ShapeDtypeStruct]


def abstract_job(experiment: Experiment, mesh: Mesh) -> AbstractJob:
    """The step of an experiment and its arguments, on a mesh of any devices.

    Raises:
      UnknownPresetError: a network is neither on this machine nor known by its name.
      ConfigError: the target is of a kind that plans are not made for, or nothing is trained.
    """
    model = experiment.model
    config = abstract_config(experiment)
    drafter = Drafter(config, model.execution)
    visual, teacher = abstract_target(model.target)
    params = {
        PROJECTOR: jax.eval_shape(lambda: init_projector(config, jax.random.key(0))),
        LANGUAGE_MODEL: abstract_model(model.language_model)[1],
    }
    if config.kind == "mlp":
        params[TARGET_MERGER] = teacher["merger"]
    trainable, frozen = split(params, trainable_patterns(experiment, config.kind))
    asks = experiment.loss.teacher == "target"
    if config.kind != "text" or asks:
        frozen[TOWER] = visual
    if asks:
        frozen[TARGET] = teacher
    frozen = jax.eval_shape(lambda p: cast_floating(p, model.frozen_dtype), frozen)
    loss = phase2.make_loss(
        drafter, experiment.loss,
        teacher=Teacher(config.target, model.execution) if asks else None,
    )  # fmt: skip
    placed = make_step(experiment, loss, trainable, frozen, mesh)
    batch = abstract_batch(experiment, config)
    return AbstractJob(placed, placed.abstract_arguments(frozen, batch))


def step_flops(experiment: Experiment) -> float:
    """Operations of a training step over all devices, with nothing computed twice.

    Raises:
      UnknownPresetError: a network is neither on this machine nor known by its name.
      ConfigError: see `abstract_job`.
    """
    model = dataclasses.replace(experiment.model, execution=experiment.model.execution.plain())
    plain = dataclasses.replace(experiment, model=model)
    return abstract_job(plain, make_mesh(plain.run.mesh)).program.flops()


def abstract_config(experiment: Experiment) -> DrafterConfig:
    """The drafter that a run starts from, by its configuration.

    Raises:
      ConfigError: the target is of a kind that plans are not made for.
    """
    model = experiment.model
    if model.target.startswith("runs/"):
        raise ConfigError(
            f"model.target={model.target!r} is what a run leaves behind; plans are made for "
            "Qwen2.5-VL and Gemma 3 targets"
        )
    _, target = find_config(model.target)
    if not isinstance(target, Gemma3Config | Qwen2_5_VLConfig):
        raise ConfigError(
            f"model.target={model.target!r} is of {type(target).__name__}; plans are made for "
            "Qwen2.5-VL and Gemma 3 targets"
        )
    return DrafterConfig.for_pair(
        target, find_config(model.language_model)[1],
        kind=None if model.kind == "auto" else model.kind, pooling=model.pooling,
    )  # fmt: skip


def abstract_target(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the tower, what a teacher has beside it) of a target, as shapes."""
    whole = abstract_model(path)[1]
    if "vision_tower" in whole:
        return whole.pop("vision_tower"), whole
    visual = dict(whole["visual"])
    merger = visual.pop("merger")
    return visual, {"merger": merger, "language_model": whole["language_model"]}


def abstract_batch(experiment: Experiment, config: DrafterConfig) -> Shapes:
    """Shapes of what `massv_jax.training.training_batches` yields, over all processes.

    They follow massv_jax.batches; a test compares the two.
    """
    data, loss = experiment.data, experiment.loss
    B, T = data.batch_size, data.max_length
    with_target = loss.teacher == "target"
    own_prompt = config.kind == "text" or config.pooling > 1
    rows: dict[str, tuple[tuple[int, ...], Any]] = {
        "tokens": ((T,), jnp.int32), "valid": ((T,), jnp.bool_), "supervised": ((T,), jnp.bool_),
    }  # fmt: skip
    if with_target and own_prompt:
        rows |= {
            "target_tokens": ((T,), jnp.int32), "target_valid": ((T,), jnp.bool_),
            "source": ((T,), jnp.int32),
        }  # fmt: skip
    if loss.teacher == "stored":
        rows |= {
            "top_ids": ((T, loss.top_k), jnp.int32), "top_logprobs": ((T, loss.top_k), jnp.float32)
        }
    sees = config.kind != "text" or with_target
    image_type = jnp.dtype(experiment.model.frozen_dtype)
    if isinstance(config.target, Gemma3Config):
        side = config.target.vision_config.image_size
        if sees:
            rows["pixels"] = ((data.max_images, side, side, 3), image_type)
    else:
        rows |= _qwen_rows(experiment, config, sees, with_target and own_prompt, image_type)
    return {
        name: jax.ShapeDtypeStruct((B, *shape), kind) for name, (shape, kind) in rows.items()
    }


def _qwen_rows(
    experiment: Experiment, config: DrafterConfig, sees: bool, own: bool, image_type: Any
) -> Mapping[str, tuple[tuple[int, ...], Any]]:
    vision, T = config.target.vision_config, experiment.data.max_length
    S = experiment.data.image_windows * vision.window_patches
    rows: dict[str, tuple[tuple[int, ...], Any]] = {}
    if config.kind != "text":
        rows |= {"positions": ((3, T), jnp.int32), "slots": ((T,), jnp.int32)}
    if own:
        rows |= {"target_positions": ((3, T), jnp.int32), "target_slots": ((T,), jnp.int32)}
    if sees:
        rows |= {
            "patches": ((S, vision.patch_values // vision.temporal_patch_size), image_type),
            "patch_positions": ((S, 2), jnp.int32), "segments": ((S,), jnp.int32),
        }  # fmt: skip
    if config.pooling > 1:
        rows["leaders"] = ((S // vision.merge_unit,), jnp.int32)
    return rows
