"""Pictures of a report, embedded in the page, and a bound on how large they make it."""

import base64
import dataclasses
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

# Pictures up to this side are kept exact and shown with hard pixel edges.
SMALL = 128
# What a gallery may weigh, and the sides that are tried until it does.
MAX_GALLERY_BYTES = 6_000_000
_SIDES = (512, 384, 256, 192, 128)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GalleryRow:
    """One example of a gallery.

    Attributes:
        images: Name ("original", "redrawn", ...) -> picture: a uint8 array [h, w, 3] or [h, w], a
            PIL image, or the path or the bytes of an image file.
        more: Further pictures, shown when asked for.
        caption: What the model wrote, or None.
        reference: What it should have written, or None.
        verdict: What a scorer said: text ("object 3 of 3") -> whether it is right.
        note: Anything else, for instance what is wrong with the caption.
        id: The example's name.
    """

    images: Mapping[str, Any]
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    caption: str | None = None
    reference: str | None = None
    verdict: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    note: str | None = None
    id: str | None = None


def encode_rows(
    rows: Sequence[GalleryRow], max_bytes: int = MAX_GALLERY_BYTES
) -> list[dict[str, Any]]:
    """Returns rows as JSON, their pictures shrunk, and at last rows dropped, to fit `max_bytes`."""
    for side in _SIDES:
        encoded = [_row(row, side) for row in rows]
        sizes = np.cumsum([_weight(row) for row in encoded])
        if not len(sizes) or sizes[-1] <= max_bytes:
            return encoded
    return encoded[: max(1, int(np.searchsorted(sizes, max_bytes, side="right")))]


def _row(row: GalleryRow, side: int) -> dict[str, Any]:
    return {
        "images": {name: encode_image(image, side) for name, image in row.images.items()},
        "more": {name: encode_image(image, side) for name, image in row.more.items()},
        "caption": row.caption,
        "reference": row.reference,
        "verdict": dict(row.verdict),
        "note": row.note,
        "id": row.id,
    }


def _weight(row: Mapping[str, Any]) -> int:
    return sum(len(image["uri"]) for key in ("images", "more") for image in row[key].values())


def encode_image(image: Any, max_side: int = _SIDES[0]) -> dict[str, Any]:
    """Returns {"uri", "width", "height"} of a picture, as PNG if small, else JPEG.

    Args:
        image: As in `GalleryRow.images`.
        max_side: Larger pictures are shrunk to it, in pixels.

    Raises:
        ValueError: An array that is not uint8 [h, w], [h, w, 1] or [h, w, 3].
    """
    picture, buffer = _open(image), io.BytesIO()
    if max(picture.size) > max_side:
        picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    if max(picture.size) <= SMALL:
        kind = "png"
        picture.save(buffer, "PNG", optimize=True)
    else:
        kind = "jpeg"
        picture.save(buffer, "JPEG", quality=88)
    data = base64.b64encode(buffer.getvalue()).decode()
    width, height = picture.size
    return {"uri": f"data:image/{kind};base64,{data}", "width": width, "height": height}


def _open(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, bytes):
        return Image.open(io.BytesIO(image)).convert("RGB")
    if isinstance(image, str | os.PathLike):
        return Image.open(image).convert("RGB")
    array = np.asarray(image)
    is_grey = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] == 1)
    if array.dtype != np.uint8 or not (is_grey or (array.ndim == 3 and array.shape[-1] == 3)):
        raise ValueError(
            f"a picture must be uint8 [h, w, 3] or [h, w], got {array.dtype} {array.shape}"
        )
    return Image.fromarray(array.reshape(array.shape[:2]) if is_grey else array).convert("RGB")
