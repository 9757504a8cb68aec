"""Jobs as shapes: the very step that `vlv_jax.training` runs, or call of `vlv_jax.cache`.

Whatever of the hub is on this machine is read (configurations, tokenizers); for the rest there are
presets (core_jax.models.presets) and the sizes of the released networks.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from core_jax.abstract import AbstractProgram
from core_jax.diffusion.schedule import NoiseSchedule
from core_jax.models.presets import abstract_model
from core_jax.sharding import abstract_like, make_mesh
from core_jax.train.placement import AbstractJob
from vlv_jax import networks as names
from vlv_jax.encoding import image_features, latent_moments
from vlv_jax.experiment import Experiment, ModelConfig
from vlv_jax.loading import (
    cast_frozen,
    compose,
    init_added,
    load_processor,
    load_schedule,
    load_tokenizer,
    pad_empty,
)
from vlv_jax.networks import Networks
from vlv_jax.training import batch_keys, divide, make_step, needs_decoder

PROMPT_LENGTH = 14  # of the task prompt in Florence-2's tokens
FLORENCE2_SIDE = 768  # of the released preprocessor_config.json


def abstract_job(experiment: Experiment, mesh: Mesh) -> AbstractJob:
    """The step of an experiment and its arguments, on a mesh of any devices.

    Raises:
      UnknownPresetError: a network is neither on this machine nor known by its name.
    """
    networks, params = abstract_networks(
        experiment.model,
        with_decoder=needs_decoder(experiment),
        with_language_model=experiment.stage == 2,
    )
    batch = abstract_batch(experiment, networks, params)
    trainable, frozen = jax.eval_shape(lambda p: divide(experiment, p), params)
    placed = make_step(experiment, networks, trainable, frozen, mesh)
    return AbstractJob(placed, placed.abstract_arguments(frozen, batch))


def step_flops(experiment: Experiment) -> float:
    """Operations of a training step over all devices, with nothing computed twice.

    Raises:
      UnknownPresetError: a network is neither on this machine nor known by its name.
    """
    model = dataclasses.replace(experiment.model, execution=experiment.model.execution.plain())
    plain = dataclasses.replace(experiment, model=model)
    return abstract_job(plain, make_mesh(plain.run.mesh)).program.flops()


def abstract_cache(experiment: Experiment, mesh: Mesh) -> AbstractProgram:
    """One call of `vlv_jax.cache`; its batch is `data.batch_size`, the mesh has one axis.

    Raises:
      UnknownPresetError: a network is neither on this machine nor known by its name.
    """
    from vlv_jax.cache import encode_views, padded_batch, rows_sharding, towers_of

    config = experiment.model
    networks, params = abstract_networks(config, with_decoder=True, with_language_model=False)
    towers = jax.eval_shape(lambda p: cast_frozen(p, config), towers_of(params))
    towers = abstract_like(towers, NamedSharding(mesh, PartitionSpec()))
    rows, side = padded_batch(experiment.data.batch_size, mesh), experiment.data.image_size
    pixels = {
        "florence_image": jax.ShapeDtypeStruct(
            (rows, *florence_size(config.florence2), 3), jnp.uint8
        ),
        "image": jax.ShapeDtypeStruct((rows, side, side, 3), jnp.uint8),
    }
    pixels = abstract_like(pixels, rows_sharding(mesh))
    return AbstractProgram(
        fn=encode_views, arguments=(networks, towers, pixels), mesh=mesh,
        parts={"frozen": towers, "batch": pixels}, rows=rows,
    )  # fmt: skip


def abstract_networks(
    config: ModelConfig, *, with_decoder: bool, with_language_model: bool
) -> tuple[Networks, dict[str, Any]]:
    """As `vlv_jax.loading.load_networks`, with shapes in the place of parameters."""
    florence_dir, pipeline = pathlib.Path(config.florence2), pathlib.Path(config.diffusion)
    paths = {names.FLORENCE2: florence_dir, names.TEXT_ENCODER: pipeline / "text_encoder"}
    if with_decoder:
        paths |= {names.UNET: pipeline / "unet", names.VAE: pipeline / "vae"}
    if with_language_model:
        paths[names.LANGUAGE_MODEL] = pathlib.Path(config.language_model)
    parts = {name: abstract_model(path) for name, path in paths.items()}
    length = parts[names.TEXT_ENCODER][0].config.max_position_embeddings
    networks = compose(
        config,
        {name: module for name, (module, _) in parts.items()},
        schedule=_schedule(pipeline),
        prompt_ids=_prompt_ids(florence_dir, config.task_prompt),
        empty_ids=_empty_ids(pipeline, length),
    )
    params = {name: shapes for name, (_, shapes) in parts.items()}
    return networks, params | jax.eval_shape(lambda: init_added(networks, 0))


def _schedule(pipeline: pathlib.Path) -> NoiseSchedule:
    return load_schedule(pipeline) if pipeline.is_dir() else NoiseSchedule.stable_diffusion()


def _prompt_ids(florence_dir: pathlib.Path, prompt: str) -> tuple[int, ...]:
    if florence_dir.is_dir():
        return tuple(load_tokenizer(florence_dir)(prompt)["input_ids"])
    return tuple(range(PROMPT_LENGTH))


def _empty_ids(pipeline: pathlib.Path, length: int) -> tuple[int, ...]:
    folder = pipeline / "tokenizer"
    return pad_empty(load_tokenizer(folder), length) if folder.is_dir() else (0,) * length


def florence_size(path: str) -> tuple[int, int]:
    """Height and width, in pixels, of what Florence-2 sees."""
    folder = pathlib.Path(path)
    if not folder.is_dir():
        return FLORENCE2_SIDE, FLORENCE2_SIDE
    size = load_processor(folder).size
    if size is None:
        raise ValueError(f"{folder / 'preprocessor_config.json'} has no size")
    return (size, size) if isinstance(size, int) else size


def abstract_batch(
    experiment: Experiment, networks: Networks, params: Any
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of what `vlv_jax.training.training_batches` yields, over all processes."""
    data = experiment.data
    B, T, side = data.batch_size, data.max_tokens, data.image_size
    views = {
        "image": jax.ShapeDtypeStruct((B, side, side, 3), jnp.uint8),
        "florence_image": jax.ShapeDtypeStruct(
            (B, *florence_size(experiment.model.florence2), 3), jnp.uint8
        ),
    }
    keys = batch_keys(experiment)
    batch = {"index": jax.ShapeDtypeStruct((B,), jnp.int32)}
    if not data.cache:
        batch |= {key: views[key] for key in keys}
    else:
        found = jax.eval_shape(
            lambda p, x: image_features(networks, p, x), params, views["florence_image"]
        )
        dtype = jnp.dtype(experiment.model.frozen_dtype)
        batch["features"] = jax.ShapeDtypeStruct(found.shape, dtype)
        if "image" in keys:
            mean, logvar = jax.eval_shape(
                lambda p, x: latent_moments(networks, p, x), params, views["image"]
            )
            batch["latent_mean"] = jax.ShapeDtypeStruct(mean.shape, jnp.float32)
            batch["latent_logvar"] = jax.ShapeDtypeStruct(logvar.shape, jnp.float32)
    if experiment.stage == 2:
        batch["tokens"] = jax.ShapeDtypeStruct((B, T), jnp.int32)
        batch["supervised"] = jax.ShapeDtypeStruct((B, T), jnp.bool_)
    return batch
