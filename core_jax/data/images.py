"""From untrusted image bytes to RGB pixels, with one defined fate for every kind of file.

The header is read and checked before any pixel is decoded, every failure is a `BadImage` with a
reason out of a fixed vocabulary (Pillow's own messages may hold memory addresses and file paths),
and nothing is ever replaced by a made-up picture. docs/data.md has the table of fates.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import io
import math
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# Pillow refuses larger images by itself; raising its limit would switch that guard off.
PILLOW_MAX_PIXELS = 2 * 89_478_485
ALL_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


class Reason(enum.StrEnum):
    """Why an image was refused: the whole vocabulary, used in counts, lists and reports."""

    NO_IMAGE = "no_image"  # the record has a caption but no image
    MISSING_FILE = "missing_file"
    OUTSIDE_ROOT = "outside_root"  # a link leads out of the dataset's folder
    EMPTY = "empty"
    TOO_MANY_BYTES = "too_many_bytes"
    NOT_AN_IMAGE = "not_an_image"  # no allowed format recognises the header
    TOO_SMALL = "too_small"
    TOO_MANY_PIXELS = "too_many_pixels"
    TOO_ELONGATED = "too_elongated"
    ANIMATED = "animated"  # only under `animated="reject"`
    TRUNCATED = "truncated"
    BROKEN = "broken"
    UNSUPPORTED_MODE = "unsupported_mode"  # pixels whose range is unknown (float, 32 bit)
    TRANSPARENT = "transparent"  # nothing of it is visible
    FLAT = "flat"  # one colour; only under `reject_flat`
    NO_CAPTION = "no_caption"  # only where the policy asks for one


class BadImage(Exception):
    """One example cannot be used; the rest of the dataset can.

    Attributes:
        reason: A member of `Reason`; it is the message too.
    """

    def __init__(self, reason: Reason):
        super().__init__(str(reason))
        self.reason = reason

    def __reduce__(self):
        return BadImage, (self.reason,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """What is accepted.

    Attributes:
        formats: Pillow's names of the formats whose decoders may run at all.
        min_side: Shorter side, in pixels, as stored.
        max_pixels: Width times height; at most Pillow's own limit of 178,956,970.
        max_aspect: Longer side over shorter side.
        max_bytes: Size of the encoded file.
        animated: "first_frame" or "reject", for GIF, APNG and animated WebP. A multi-page TIFF and
            the multi-picture JPEG of phones are still images: their first picture is taken.
        reject_flat: Refuse an image of a single colour (placeholders, failed exports).
    """

    formats: tuple[str, ...] = ALL_FORMATS
    min_side: int = 32
    max_pixels: int = 89_478_485
    max_aspect: float = 20.0
    max_bytes: int = 64 * 2**20
    animated: str = "first_frame"
    reject_flat: bool = False

    def __post_init__(self):
        unknown = sorted(set(self.formats) - set(ALL_FORMATS))
        if unknown or not self.formats:
            raise ValueError(f"ImageLimits.formats: {unknown or 'empty'}; known: {ALL_FORMATS}")
        if self.animated not in ("first_frame", "reject"):
            raise ValueError(
                f"ImageLimits.animated is {self.animated!r}; it is 'first_frame' or 'reject'"
            )
        if not 1 <= self.max_pixels <= PILLOW_MAX_PIXELS:
            raise ValueError(
                f"ImageLimits.max_pixels is {self.max_pixels}; it is in 1..{PILLOW_MAX_PIXELS}"
            )
        if self.min_side < 1 or self.max_aspect < 1 or self.max_bytes < 1:
            raise ValueError("ImageLimits: min_side, max_aspect and max_bytes are at least 1")


# Of a picture whose size the caller has accepted already.
ANY_SIZE = ImageLimits(min_side=1, max_pixels=PILLOW_MAX_PIXELS, max_aspect=math.inf)


@dataclasses.dataclass(frozen=True)
class ImageHeader:
    """What the header says, before a pixel is decoded: Pillow's format and mode, pixels."""

    format: str
    mode: str
    width: int
    height: int


def read_bytes(image: bytes | str | os.PathLike, limits: ImageLimits) -> bytes:
    """Returns the encoded bytes, without reading a file that is too large.

    Raises:
        BadImage: MISSING_FILE, EMPTY or TOO_MANY_BYTES. Other I/O errors (a disk that fails) pass
            through: they say nothing about the image, and skipping would change the data order.
    """
    if isinstance(image, (bytes, bytearray, memoryview)):
        size, data = len(image), bytes(image)
    else:
        try:
            path = Path(image)
            size = path.stat().st_size
            data = path.read_bytes() if size <= limits.max_bytes else b""
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise BadImage(Reason.MISSING_FILE) from None
    if size == 0:
        raise BadImage(Reason.EMPTY)
    if size > limits.max_bytes:
        raise BadImage(Reason.TOO_MANY_BYTES)
    return data


def open_header(data: bytes, limits: ImageLimits) -> Image.Image:
    """Reads and checks the header; the result has its size and mode but no pixels yet.

    Raises:
        BadImage: NOT_AN_IMAGE, TOO_SMALL, TOO_MANY_PIXELS, TOO_ELONGATED, ANIMATED or BROKEN.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=limits.formats)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImage(Reason.TOO_MANY_PIXELS) from None
    except Image.UnidentifiedImageError:
        raise BadImage(Reason.NOT_AN_IMAGE) from None
    except Exception as error:  # plugins raise nearly anything on hostile bytes
        raise BadImage(_reason_of(error)) from None
    _check_size(image.size, limits)
    if limits.animated == "reject" and _is_animated(image):
        raise BadImage(Reason.ANIMATED)
    return image


def inspect_header(image: bytes | str | os.PathLike, limits: ImageLimits) -> ImageHeader:
    """Checks everything that can be checked without decoding; raises as `open_header` does."""
    opened = open_header(read_bytes(image, limits), limits)
    return ImageHeader(opened.format or "", opened.mode, *opened.size)


def decode_image(
    image: bytes | str | os.PathLike, limits: ImageLimits | None = None
) -> Image.Image:
    """Decodes one image to 8-bit RGB, upright, without transparency.

    Args:
        image: The encoded bytes, or the path of a file.
        limits: What is accepted; the defaults of `ImageLimits` where None.

    Returns:
        A loaded Pillow image of mode "RGB" (its array is uint8 [h, w, 3]), turned as its EXIF
        orientation says, composited on white where it is transparent.

    Raises:
        BadImage: With any reason of `Reason` that concerns an image.
    """
    limits = limits or ImageLimits()
    opened = open_header(read_bytes(image, limits), limits)
    try:
        opened.load()
    except Exception as error:
        raise BadImage(_reason_of(error)) from None
    return upright_rgb(opened, limits)


def upright_rgb(image: Image.Image, limits: ImageLimits | None = None) -> Image.Image:
    """What `decode_image` makes of a picture that is decoded already.

    Args:
        image: A Pillow image of any mode.
        limits: What is accepted; those of files (formats, bytes, animation) say nothing here.

    Raises:
        BadImage: As `decode_image`.
    """
    limits = limits or ImageLimits()
    _check_size(image.size, limits)
    # A broken EXIF block says nothing about the pixels: the stored orientation is kept.
    with contextlib.suppress(Exception):
        image = ImageOps.exif_transpose(image)
    try:
        decoded = _to_rgb(image)
    except BadImage:
        raise
    except Exception:
        raise BadImage(Reason.UNSUPPORTED_MODE) from None
    if limits.reject_flat and decoded.getcolors(maxcolors=1) is not None:
        raise BadImage(Reason.FLAT)
    return decoded


def _check_size(size: tuple[int, int], limits: ImageLimits) -> None:
    width, height = size
    if min(width, height) < limits.min_side:
        raise BadImage(Reason.TOO_SMALL)
    if width * height > limits.max_pixels:
        raise BadImage(Reason.TOO_MANY_PIXELS)
    if max(width, height) > limits.max_aspect * min(width, height):
        raise BadImage(Reason.TOO_ELONGATED)


def _is_animated(image: Image.Image) -> bool:
    if image.format in ("MPO", "TIFF"):
        return False
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception as error:  # counting frames parses more of the file
        raise BadImage(_reason_of(error)) from None


def _reason_of(error: Exception) -> Reason:
    """Maps Pillow's exception to the vocabulary; its text goes no further than this function."""
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return Reason.TOO_MANY_PIXELS
    if isinstance(error, EOFError) or "truncated" in str(error).lower():
        return Reason.TRUNCATED
    return Reason.BROKEN


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        return _from_16_bit(image)
    if image.mode == "F":
        raise BadImage(Reason.UNSUPPORTED_MODE)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if rgba.getchannel("A").getextrema()[1] == 0:
            raise BadImage(Reason.TRANSPARENT)
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    # Palette, grey, 1 bit, CMYK (Pillow undoes Adobe's inversion on load), YCbCr, Lab. Colour
    # profiles are ignored, as every training pipeline of the field does.
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    # Pillow's own conversion clips at 255, which turns nearly every 16-bit image white.
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise BadImage(Reason.UNSUPPORTED_MODE)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
