"""How large a target's images may be: a drafter must be trained and used under the same limits.

Only Qwen2.5-VL has such limits. They come from the processor's file, or from the config's
`data.min_pixels` and `data.max_pixels` in its place.
"""

import dataclasses
from collections.abc import Mapping

from core_jax.decode.frontends import Qwen2_5_VLFrontend
from core_jax.decode.target import Target
from massv_jax.experiment import DataConfig

NAMES = ("min_pixels", "max_pixels")


def pixel_limits(data: DataConfig) -> dict[str, int]:
    """The limits that a config sets; what it leaves at 0 is the processor's own."""
    return {name: value for name in NAMES if (value := getattr(data, name))}


def limit_pixels(target: Target, limits: Mapping[str, int]) -> Target:
    """The target with other limits; targets without any stay as they are."""
    if not limits or not isinstance(target.frontend, Qwen2_5_VLFrontend):
        return target
    processor = target.frontend.processor
    images = dataclasses.replace(processor.image_processor, **limits)
    processor = dataclasses.replace(processor, image_processor=images)
    return dataclasses.replace(target, frontend=Qwen2_5_VLFrontend(processor))


def pixels_of(target: Target) -> dict[str, int]:
    """The limits that a loaded target works under; {} where it has none."""
    if not isinstance(target.frontend, Qwen2_5_VLFrontend):
        return {}
    images = target.frontend.processor.image_processor
    return {name: getattr(images, name) for name in NAMES}
