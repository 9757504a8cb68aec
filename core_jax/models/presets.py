"""Networks as shapes, from a hub directory's config.json or, where there is none, from its name.

For everything that needs no weights: plans of jobs whose checkpoints are not on this machine.
"""

import contextlib
import importlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from core_jax.convert.safetensors_io import CheckpointFormatError, TensorReader
from core_jax.models.auto import load_config
from core_jax.models.family import Family

# The end of a hub repository's path -> family and preset of its configuration. A fine-tuned model
# has the shapes of the model that it was tuned from.
_SD21 = ("stable-diffusion-2-1-base", "stable-diffusion-2-1")
_SD15 = ("stable-diffusion-v1-5",)
PRESETS: Mapping[str, tuple[str, str]] = {
    "Florence-2-base": ("florence2", "base"),
    "Florence-2-base-ft": ("florence2", "base"),
    "Florence-2-large": ("florence2", "large"),
    "Florence-2-large-ft": ("florence2", "large"),
    **{f"{n}/text_encoder": ("clip_text", "sd21") for n in _SD21},
    **{f"{n}/unet": ("unet", "sd21_base") for n in _SD21},
    **{f"{n}/vae": ("autoencoder_kl", "sd21") for n in _SD21},
    **{f"{n}/text_encoder": ("clip_text", "sd15") for n in _SD15},
    **{f"{n}/unet": ("unet", "sd15") for n in _SD15},
    **{f"{n}/vae": ("autoencoder_kl", "sd21") for n in _SD15},  # the same shapes
    **{
        f"Qwen2.5-{size}{kind}": ("qwen2", f"qwen2p5_{size.lower().replace('.', 'p')}")
        for size in ("0.5B", "1.5B", "3B", "7B")
        for kind in ("", "-Instruct")
    },
    **{
        f"Qwen2.5-VL-{size}-Instruct": ("qwen2_5_vl", f"qwen2p5_vl_{size.lower()}")
        for size in ("3B", "7B", "32B")
    },
    **{
        f"gemma-3-{size}-{kind}": ("gemma3", f"gemma3_{size}")
        for size in ("4b", "12b", "27b")
        for kind in ("it", "pt")
    },
    **{f"gemma-3-1b-{kind}": ("gemma3_text", "gemma3_1b") for kind in ("it", "pt")},
}


class UnknownPresetError(ValueError):
    """A network is neither on this machine nor known by its name; the message lists what is."""


def find_config(path: str | os.PathLike) -> tuple[Family, Any]:
    """The family and configuration of a hub directory, which need not be on this machine.

    Args:
      path: a hub directory, of which no more than config.json and the headers of the weights are
        read; or where one would be, `hub/Qwen/Qwen2.5-1.5B` say, whose last parts name a preset.

    Raises:
      UnknownPresetError: there is no such directory, and the name has no preset.
      FileNotFoundError: the directory has no config.json.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        family, config = load_config(path)
        if family.adapt is not None:
            with contextlib.suppress(CheckpointFormatError):  # configuration alone: it has to do
                config = family.adapt(config, TensorReader(path).shapes)
        return family, config
    names = {name.lower(): found for name, found in PRESETS.items()}
    for ending in ("/".join(path.parts[-2:]), path.name):
        if found := names.get(ending.lower()):
            family = importlib.import_module(f"core_jax.models.{found[0]}").FAMILY
            return family, getattr(family.config, found[1])()
    raise UnknownPresetError(
        f"{path} is not on this machine, and no preset has its name. Download its config.json "
        f"there, or use a directory named as one of: {', '.join(sorted(PRESETS))}"
    )


def abstract_model(path: str | os.PathLike) -> tuple[Any, dict[str, Any]]:
    """A network and the shapes of its parameters (float32), as `load_model` would return them.

    Raises:
      UnknownPresetError: see `find_config`.
    """
    family, config = find_config(path)
    model = family.model(config=config)
    return model, dict(family.abstract_params(model))
