"""Sizes and crops on the host, through Pillow: the kernel the hub's image processors use.

All functions take and return Pillow images of mode "RGB". Pillow's bicubic (a = -0.5, with
antialiasing, in integers) is the reference that pretrained towers saw.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image

from core_jax.data.images import BadImage, Reason

RESAMPLE = {
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CropSpec:
    """How an image of any shape becomes a square one.

    Attributes:
        size: Side of the result, in pixels.
        kind: "center": the shorter side is resized to `size`, the middle is kept.
            "random": the same, but the kept part is random along the longer side.
            "native": a `size` square of the stored pixels, never resized. Text and small objects
            keep the detail that the camera recorded; a scene is seen only in part.
            "native_random": the same at a random place.
            "squash": both sides are resized to `size`, the aspect ratio is lost.
        resample: A key of `RESAMPLE`.
        small: What "native" does with an image whose shorter side is below `size`: "reject"
            (TOO_SMALL) or "resize" (as "center").
    """

    size: int
    kind: str = "center"
    resample: str = "bicubic"
    small: str = "reject"

    def __post_init__(self):
        kinds = ("center", "random", "native", "native_random", "squash")
        for name, allowed in (
            ("kind", kinds), ("resample", tuple(RESAMPLE)), ("small", ("reject", "resize")),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ValueError(f"CropSpec.{name} is {getattr(self, name)!r}; known: {allowed}")
        if self.size < 1:
            raise ValueError(f"CropSpec.size is {self.size}; it is at least 1")

    @property
    def is_random(self) -> bool:
        """Whether the result depends on the generator (then it must not be cached)."""
        return self.kind in ("random", "native_random")


def crop_image(
    image: Image.Image, spec: CropSpec, rng: np.random.Generator | None = None
) -> Image.Image:
    """Applies `spec`; the random kinds draw from `rng` and nothing else.

    Raises:
        BadImage: TOO_SMALL, for "native" under `small="reject"`.
        ValueError: A random kind without `rng`.
    """
    if spec.kind == "squash":
        return image.resize((spec.size, spec.size), RESAMPLE[spec.resample])
    native = spec.kind.startswith("native")
    if native and min(image.size) < spec.size:
        if spec.small == "reject":
            raise BadImage(Reason.TOO_SMALL)
        return resize_shorter_side_and_center_crop(image, spec.size, spec.resample)
    if not native:
        image = resize_shorter_side(image, spec.size, spec.resample)
    if not spec.is_random:
        return _crop(image, spec.size)
    if rng is None:
        raise ValueError(f"CropSpec.kind={spec.kind!r} needs a seeded generator")
    return random_crop(image, spec.size, rng)


def shorter_side_shape(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) with the shorter side `size`; the longer is truncated, as transformers'."""
    if width <= height:
        return int(size * height / width), size
    return size, int(size * width / height)


def resize_shorter_side(image: Image.Image, size: int, resample: str = "bicubic") -> Image.Image:
    """Resizes so that the shorter side is `size` pixels; the aspect ratio is kept."""
    height, width = shorter_side_shape(image.height, image.width, size)
    return image.resize((width, height), RESAMPLE[resample])


def resize_shorter_side_and_center_crop(
    image: Image.Image, size: int, resample: str = "bicubic"
) -> Image.Image:
    """The `size` square from the middle, after the shorter side was resized to `size`."""
    return _crop(resize_shorter_side(image, size, resample), size)


def random_crop(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """A `size` square at a place drawn from `rng`, without resizing.

    Raises:
        BadImage: TOO_SMALL where a side is shorter than `size`.
    """
    if min(image.size) < size:
        raise BadImage(Reason.TOO_SMALL)
    top = int(rng.integers(image.height - size + 1))
    left = int(rng.integers(image.width - size + 1))
    return image.crop((left, top, left + size, top + size))


def _crop(image: Image.Image, size: int) -> Image.Image:
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
