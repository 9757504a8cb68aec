"""Qwen2.5-VL's image preprocessing: pixels to patches.

Equal to transformers' `Qwen2VLImageProcessorPil` to the last bit for 8-bit pictures that stand
upright; others have the fate of their files (core_jax.data.images), here as everywhere. Numpy, on
the host.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from core_jax.data.images import ANY_SIZE, upright_rgb
from core_jax.data.processors import ImageProcessor, ProcessorError
from core_jax.models.qwen2_5_vl.packing import Grid

MAX_ASPECT_RATIO = 200

_DEFAULTS: Mapping[str, Any] = {
    "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
    "rescale_factor": 1 / 255, "resample": 3, "patch_size": 14, "temporal_patch_size": 2,
    "merge_size": 2, "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}  # fmt: skip
# Keys of other tools in the same file that do not change a pixel.
_IGNORED = frozenset({
    "min_pixels", "max_pixels",  # read below, as `size`
    "image_processor_type", "feature_extractor_type", "processor_class", "data_format",
    "input_data_format", "return_tensors", "default_to_square", "device", "disable_grouping",
    "do_center_crop", "crop_size", "do_pad", "pad_size", "image_seq_length",
})  # fmt: skip
_KINDS = ("Qwen2VLImageProcessor", "Qwen2_5_VLImageProcessor")


def smart_resize(
    height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """The size that an image is given (transformers' `smart_resize`).

    Both sides are multiples of `factor`, the area is between the limits, and the shape is kept as
    far as that allows.

    Args:
      height: of the image in pixels.
      width: of the image in pixels.
      factor: pixels of one image token's side.
      min_pixels: lower limit of the area.
      max_pixels: upper limit of the area.

    Raises:
      ValueError: one side is more than 200 times the other.
    """
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT_RATIO:
        raise ValueError(
            f"an image of {height} x {width} pixels: one side is {ratio:.0f} times the other, "
            f"at most {MAX_ASPECT_RATIO} are allowed; crop it"
        )
    high, wide = round(height / factor) * factor, round(width / factor) * factor
    if high * wide > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        high = max(factor, math.floor(height / beta / factor) * factor)
        wide = max(factor, math.floor(width / beta / factor) * factor)
    elif high * wide < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        high = math.ceil(height * beta / factor) * factor
        wide = math.ceil(width * beta / factor) * factor
    return high, wide


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2_5_VLImageProcessor:
    """Resize, normalise, cut into patches.

    Attributes:
      min_pixels, max_pixels: limits of the resized area.
      patch_size, merge_size, temporal_patch_size: see the vision tower's configuration.
      resample: Pillow's number of the filter (3 bicubic).
      do_resize: without it images must have sides that divide.
      rescale_factor: factor on the 8-bit values; None does not rescale.
      mean, std: of the channels after rescaling; None does not normalise.
    """

    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    patch_size: int = 14
    merge_size: int = 2
    temporal_patch_size: int = 2
    resample: int = 3
    do_resize: bool = True
    rescale_factor: float | None = 1 / 255
    mean: tuple[float, ...] | None = _DEFAULTS["image_mean"]
    std: tuple[float, ...] | None = _DEFAULTS["image_std"]

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Qwen2_5_VLImageProcessor:
        """Reads the contents of a preprocessor_config.json.

        Raises:
          ProcessorError: another processor, or a key that would change the pixels in a way that
            this class does not know.
        """
        kind = str(config.get("image_processor_type") or _KINDS[0])
        if kind.removesuffix("Fast").removesuffix("Pil") not in _KINDS:
            raise ProcessorError(f"image processor {kind!r} is not one of {', '.join(_KINDS)}")
        if unknown := sorted(set(config) - set(_DEFAULTS) - _IGNORED):
            raise ProcessorError(
                f"preprocessor_config.json has keys this port does not know: {unknown}"
            )
        c = {**_DEFAULTS, **{k: v for k, v in config.items() if v is not None}}
        if c.get("do_center_crop") or c.get("do_pad") or not c["do_convert_rgb"]:
            raise ProcessorError(
                "preprocessor_config.json asks for do_center_crop, do_pad or no do_convert_rgb, "
                "which are not supported"
            )
        return cls(
            min_pixels=int(c.get("min_pixels") or c["size"]["shortest_edge"]),
            max_pixels=int(c.get("max_pixels") or c["size"]["longest_edge"]),
            patch_size=c["patch_size"],
            merge_size=c["merge_size"],
            temporal_patch_size=c["temporal_patch_size"],
            resample=int(c["resample"]),
            do_resize=c["do_resize"],
            rescale_factor=float(c["rescale_factor"]) if c["do_rescale"] else None,
            mean=tuple(map(float, c["image_mean"])) if c["do_normalize"] else None,
            std=tuple(map(float, c["image_std"])) if c["do_normalize"] else None,
        )

    def to_hf(self) -> dict[str, Any]:
        """The contents of a preprocessor_config.json, for transformers 4 and 5."""
        config = {
            "image_processor_type": _KINDS[0],
            "processor_class": "Qwen2_5_VLProcessor",
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
            "size": {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels},
            "patch_size": self.patch_size,
            "merge_size": self.merge_size,
            "temporal_patch_size": self.temporal_patch_size,
            "resample": self.resample,
            "do_resize": self.do_resize,
            "do_rescale": self.rescale_factor is not None,
            "do_normalize": self.mean is not None,
        }
        if self.rescale_factor is not None:
            config["rescale_factor"] = self.rescale_factor
        if self.mean is not None and self.std is not None:
            config |= {"image_mean": list(self.mean), "image_std": list(self.std)}
        return config

    def size_for(self, height: int, width: int) -> tuple[int, int]:
        """The size in pixels that an image of this size is given."""
        if not self.do_resize:
            return height, width
        return smart_resize(
            height, width, factor=self.patch_size * self.merge_size,
            min_pixels=self.min_pixels, max_pixels=self.max_pixels,
        )  # fmt: skip

    def grid_for(self, height: int, width: int) -> Grid:
        """(frames, rows, columns) of patches for an image of this size in pixels."""
        high, wide = self.size_for(height, width)
        return 1, high // self.patch_size, wide // self.patch_size

    def __call__(self, image: Image.Image | np.ndarray) -> tuple[np.ndarray, Grid]:
        """Cuts one image into patches.

        Args:
          image: a Pillow image (what is transparent becomes white), or uint8 [h, w, 3].

        Returns:
          float32 [patches, C] as `pack_images` takes them, and the grid.

        Raises:
          ValueError: not such an image, one too elongated, or (without `do_resize`) sides that
            do not divide into image tokens.
        """
        image = _as_rgb(image)
        high, wide = self.size_for(image.height, image.width)
        p, m, t = self.patch_size, self.merge_size, self.temporal_patch_size
        if high % (p * m) or wide % (p * m):
            raise ValueError(
                f"an image of {high} x {wide} pixels does not divide into image tokens of "
                f"{p * m} pixels; set do_resize"
            )
        if self.do_resize:
            image = image.resize((wide, high), Image.Resampling(self.resample))
        values = self._normalizer.normalize(np.asarray(image))
        rows, columns = high // p, wide // p
        x = values.reshape(rows // m, m, p, columns // m, m, p, 3)
        x = x.transpose(0, 3, 1, 4, 6, 2, 5)  # token row, token column, patch, then its values
        x = np.broadcast_to(x[:, :, :, :, :, None], (*x.shape[:5], t, *x.shape[5:]))
        return x.reshape(rows * columns, -1), (1, rows, columns)

    @functools.cached_property
    def _normalizer(self) -> ImageProcessor:
        return ImageProcessor(
            size=None, rescale_factor=self.rescale_factor, mean=self.mean, std=self.std
        )


def _as_rgb(image: Image.Image | np.ndarray) -> Image.Image:
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise ValueError(f"images are uint8 [h, w, 3], not {image.dtype} {image.shape}")
        return Image.fromarray(image)
    return upright_rgb(image, ANY_SIZE)  # sizes are checked where the patches are counted
