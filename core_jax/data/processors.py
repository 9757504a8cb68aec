"""Image preprocessing as a checkpoint's preprocessor_config.json describes it, in numpy.

Equal to transformers' `CLIPImageProcessorPil` (and its SigLIP twin) to the last bit, because both
resize 8-bit pixels with Pillow, and everything after that is a table of 256 entries a channel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from core_jax.data.resize import shorter_side_shape

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# What transformers assumes for keys that a preprocessor_config.json leaves out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "CLIPImageProcessor": {
        "resample": 3, "size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224},
        "do_center_crop": True, "image_mean": _CLIP_MEAN, "image_std": _CLIP_STD,
    },
    "SiglipImageProcessor": {
        "resample": 3, "size": {"height": 224, "width": 224}, "crop_size": None,
        "do_center_crop": False, "image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5),
    },
    "Gemma3ImageProcessor": {
        "resample": 2, "size": {"height": 224, "width": 224}, "crop_size": None,
        "do_center_crop": False, "image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5),
    },
}  # fmt: skip
# Keys of other tools in the same file that do not change a pixel.
_IGNORED = frozenset({
    "auto_map", "processor_class", "_valid_processor_keys", "image_seq_length", "data_format",
    "input_data_format", "do_convert_rgb", "return_tensors", "default_to_square", "device",
    "disable_grouping", "pad_size", "image_processor_type", "feature_extractor_type",
})  # fmt: skip


class ProcessorError(ValueError):
    """A checkpoint's preprocessing files are of another model, or ask for what is not supported."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageProcessor:
    """Resize, centre crop, rescale, normalise.

    Attributes:
        kind: "CLIPImageProcessor", "SiglipImageProcessor" or "Gemma3ImageProcessor"; written back
            by `to_hf`.
        size: (height, width), or one int for the shorter side; None does not resize.
        crop: (height, width) of the centre crop; None does not crop. A smaller image is padded
            with zeros before normalisation, as transformers does.
        resample: Pillow's number of the filter (2 bilinear, 3 bicubic).
        rescale_factor: Factor on the 8-bit values; None does not rescale.
        mean: Channel means after rescaling; None (with `std`) does not normalise.
        std: Channel deviations after rescaling.
        extra: Keys of the file that do not change a pixel, kept for `to_hf`.
    """

    kind: str = "CLIPImageProcessor"
    size: tuple[int, int] | int | None
    crop: tuple[int, int] | None = None
    resample: int = 3
    rescale_factor: float | None = 1 / 255
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self):
        if (self.mean is None) != (self.std is None):
            raise ProcessorError("ImageProcessor: mean and std are both given or both None")
        if any(len(values) != 3 for values in (self.mean, self.std) if values is not None):
            raise ProcessorError("ImageProcessor: mean and std have 3 entries, one a channel")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ImageProcessor:
        """Reads the contents of a preprocessor_config.json.

        Raises:
            ProcessorError: An unsupported processor, or a key that would change the pixels in a way
                this class does not know.
        """
        kind = config.get("image_processor_type") or config.get("feature_extractor_type")
        kind = str(kind or "CLIPImageProcessor").removesuffix("Fast").removesuffix("Pil")
        kind = kind.replace("FeatureExtractor", "ImageProcessor")
        if kind not in _DEFAULTS:
            raise ProcessorError(f"image processor {kind!r} is not one of {sorted(_DEFAULTS)}")
        merged = {
            "do_resize": True, "do_rescale": True, "do_normalize": True, "do_pad": None,
            "rescale_factor": 1 / 255, **_DEFAULTS[kind],
        }  # fmt: skip
        unknown = sorted(set(config) - set(merged) - _IGNORED)
        if unknown:
            raise ProcessorError(
                f"preprocessor_config.json has keys this port does not know: {unknown}"
            )
        merged.update({k: v for k, v in config.items() if k in merged and v is not None})
        if merged["do_pad"]:
            raise ProcessorError("preprocessor_config.json asks for do_pad, which is not supported")
        return cls(
            kind=kind,
            size=_read_size(merged["size"]) if merged["do_resize"] else None,
            crop=_read_crop(merged["crop_size"]) if merged["do_center_crop"] else None,
            resample=int(merged["resample"]),
            rescale_factor=float(merged["rescale_factor"]) if merged["do_rescale"] else None,
            mean=_floats(merged["image_mean"]) if merged["do_normalize"] else None,
            std=_floats(merged["image_std"]) if merged["do_normalize"] else None,
            extra={k: config[k] for k in sorted(_IGNORED & set(config))},
        )

    def to_hf(self) -> dict[str, Any]:
        """The contents of a preprocessor_config.json that `from_hf` and transformers read."""
        if isinstance(self.size, int):
            size: Any = {"shortest_edge": self.size}
        else:
            size = {"height": self.size[0], "width": self.size[1]} if self.size else None
        config = dict(self.extra) | {
            "image_processor_type": self.kind,
            "do_resize": self.size is not None, "resample": self.resample,
            "do_center_crop": self.crop is not None,
            "do_rescale": self.rescale_factor is not None,
            "do_normalize": self.mean is not None,
        }  # fmt: skip
        optional = {
            "size": size,
            "crop_size": {"height": self.crop[0], "width": self.crop[1]} if self.crop else None,
            "rescale_factor": self.rescale_factor,
            "image_mean": list(self.mean) if self.mean else None,
            "image_std": list(self.std) if self.std else None,
        }
        return config | {k: v for k, v in optional.items() if v is not None}

    def resize(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """Resized and cropped 8-bit pixels: uint8 [h, w, 3].

        What to send to a device: a quarter of the bytes; `normalize` can follow there.
        """
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
                raise ValueError(f"images are uint8 [h, w, 3], not {image.dtype} {image.shape}")
            image = Image.fromarray(image)
        image = image if image.mode == "RGB" else image.convert("RGB")
        if self.size is not None:
            shape = self.size
            if isinstance(shape, int):
                shape = shorter_side_shape(image.height, image.width, shape)
            image = image.resize((shape[1], shape[0]), Image.Resampling(self.resample))
        pixels = np.asarray(image)
        return pixels if self.crop is None else _center_crop_or_pad(pixels, *self.crop)

    def normalize(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [..., 3] to float32 [..., 3]: (pixels * rescale_factor - mean) / std."""
        table = self._table()
        return np.stack([table[c][pixels[..., c]] for c in range(3)], axis=-1)

    def __call__(
        self, images: Image.Image | np.ndarray | Sequence[Image.Image | np.ndarray]
    ) -> np.ndarray:
        """Preprocesses images of any sizes.

        Args:
            images: One Pillow image, one uint8 [h, w, 3], a sequence of these, or [B, h, w, 3].

        Returns:
            float32 [B, h, w, 3] (transformers returns the same numbers as [B, 3, h, w]).
        """
        if isinstance(images, Image.Image) or (isinstance(images, np.ndarray) and images.ndim == 3):
            images = [images]
        return self.normalize(np.stack([self.resize(image) for image in images]))

    def _table(self) -> np.ndarray:
        # The very operations of transformers, in its order and precisions, on all 256 inputs.
        values = np.arange(256)
        if self.rescale_factor is not None:
            values = values.astype(np.float64) * self.rescale_factor
        values = np.repeat(values.astype(np.float32)[:, None], 3, axis=1)
        if self.mean is not None:
            values = (values - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.ascontiguousarray(values.T)


def _read_size(size: Any) -> tuple[int, int] | int:
    if isinstance(size, int):
        return size  # the oldest files: the shorter side
    if isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
        return int(size["shortest_edge"])
    if isinstance(size, Mapping) and set(size) == {"height", "width"}:
        return int(size["height"]), int(size["width"])
    raise ProcessorError(f"preprocessor_config.json: size {size!r} is not supported")


def _read_crop(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size["height"]), int(size["width"]))


def _floats(values: Any) -> tuple[float, ...]:
    values = [values] * 3 if isinstance(values, (int, float)) else values
    return tuple(float(v) for v in values)


def _center_crop_or_pad(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    h, w = pixels.shape[:2]
    if h < height or w < width:
        padded = np.zeros((max(h, height), max(w, width), 3), pixels.dtype)
        # transformers rounds the padding above and to the left up.
        top, left = -((h - padded.shape[0]) // 2), -((w - padded.shape[1]) // 2)
        padded[top : top + h, left : left + w] = pixels
        top, left = (h - height) // 2 + top, (w - width) // 2 + left
        return padded[max(0, top) : max(0, top) + height, max(0, left) : max(0, left) + width]
    top, left = (h - height) // 2, (w - width) // 2
    return pixels[top : top + height, left : left + width]
