"""Which examples `core_jax.data.prepare` keeps: one example at a time, and one group at a time.

Pure functions of their arguments, without Apache Beam, so that every rule can be tested by itself.

The first rule that an example breaks, in this order, is its one reason: no readable bytes (the
reasons of core_jax.data.images), an excluded id, the watermark score, excluded bytes, the header,
the shorter side, the aspect ratio, the pixels, the caption, likeness to an excluded image; then,
among those that are left, the same id, the same bytes, a near duplicate of an earlier example.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from core_jax.data.images import BadImage, ImageLimits, Reason, decode_image, inspect_header
from core_jax.data.sources import Example

HASH_BITS = 64  # the uppermost is never set, so that a hash is a positive int64
COLOUR_VALUES = 48  # a 4 x 4 grid of RGB means
_SIDE = 32  # of the picture that hashes see


class Dropped(enum.StrEnum):
    """Why a readable image is left out; what makes it unreadable is in `images.Reason`."""

    EXCLUDED_ID = "excluded_id"
    EXCLUDED_BYTES = "excluded_bytes"
    EXCLUDED_NEAR = "excluded_near"
    NO_WATERMARK_SCORE = "no_watermark_score"
    WATERMARK = "watermark"
    SHORT_SIDE = "short_side"
    ASPECT_RATIO = "aspect_ratio"
    DUPLICATE_ID = "duplicate_id"
    DUPLICATE_BYTES = "duplicate_bytes"
    NEAR_DUPLICATE = "near_duplicate"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """Stage 1's filters; the defaults are the paper's.

    Attributes:
        side_above: The shorter side must be larger than this, in pixels.
        min_aspect: Least width over height of the upright image; the bound itself is allowed.
        max_aspect: Most.
        watermark_below: The score must be smaller than this; None asks for no score.
        watermark_key: Key of the score in the extras; img2dataset's name.
        missing_watermark: "drop" or "keep" an example without a number in 0..1 as its score.
        require_caption: Drop examples without a caption.
        near_distance: Bits in which near duplicates differ at most, 0..7; None looks for none.
        near_colour: Mean difference of near duplicates' colours at most, in levels of 0..255.
    """

    side_above: int = 512
    min_aspect: float = 0.5
    max_aspect: float = 2.0
    watermark_below: float | None = 0.5
    watermark_key: str = "pwatermark"
    missing_watermark: str = "drop"
    require_caption: bool = False
    near_distance: int | None = 4
    near_colour: float = 12.0

    def __post_init__(self):
        if self.side_above < 0:
            raise ValueError(f"side_above is {self.side_above}; it is at least 0")
        if not 0 < self.min_aspect <= self.max_aspect:
            raise ValueError(
                f"aspect ratios from {self.min_aspect} to {self.max_aspect}: they are positive, "
                "the least first"
            )
        if self.missing_watermark not in ("drop", "keep"):
            raise ValueError(f"missing_watermark is {self.missing_watermark!r}; 'drop' or 'keep'")
        if self.near_distance is not None and not 0 <= self.near_distance <= 7:
            raise ValueError(f"near_distance is {self.near_distance}; it is in 0..7, or None")


@dataclasses.dataclass(frozen=True)
class Exclusion:
    """What must not be in the data.

    Attributes:
        ids: Of examples.
        sha256: Digests of encoded files.
        hashes: Perceptual hashes, uint64 [n].
        colours: Their colours, uint8 [n, 48].
    """

    ids: frozenset[str] = frozenset()
    sha256: frozenset[bytes] = frozenset()
    hashes: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.uint64))
    colours: np.ndarray = dataclasses.field(
        default_factory=lambda: np.zeros((0, COLOUR_VALUES), np.uint8)
    )


@dataclasses.dataclass(frozen=True)
class Look:
    """What one look at an example found.

    Attributes:
        id: Of the example, valid Unicode.
        reason: Why it is dropped, "" where it is not (yet).
        score_missing: It has no usable watermark score, and that was no reason to drop it.
        sha256: Of the encoded bytes; empty where there are none.
        hash: Perceptual, 0 where the image was not decoded.
        colour: 48 bytes; empty where the image was not decoded.
        width: Of the upright image, 0 where the image was not decoded.
        height: Likewise.
    """

    id: str
    reason: str = ""
    score_missing: bool = False
    sha256: bytes = b""
    hash: int = 0
    colour: bytes = b""
    width: int = 0
    height: int = 0


def look_at(example: Example, rules: Rules, limits: ImageLimits, exclusion: Exclusion) -> Look:
    """Applies every rule that concerns one example alone."""
    found = Look(example.id)
    try:
        data = example.encoded_image(limits)
        found = dataclasses.replace(found, sha256=hashlib.sha256(data).digest())
        if found.id in exclusion.ids:
            return dataclasses.replace(found, reason=Dropped.EXCLUDED_ID)
        score = watermark_score(example.extras, rules.watermark_key)
        reason = _judge_watermark(score, rules)
        if not reason and found.sha256 in exclusion.sha256:
            reason = Dropped.EXCLUDED_BYTES
        reason = reason or _judge_header(data, rules, limits)
        if reason:
            return dataclasses.replace(found, reason=reason)
        image = decode_image(data, limits)
    except BadImage as error:
        return dataclasses.replace(found, reason=error.reason)
    phash, colour = fingerprint(image)
    found = dataclasses.replace(
        found, hash=phash, colour=colour, width=image.width, height=image.height,
        score_missing=rules.watermark_below is not None and score is None,
    )  # fmt: skip
    if not _shape_allowed(image.width, image.height, rules):
        return dataclasses.replace(found, reason=Dropped.ASPECT_RATIO)
    if rules.require_caption and not example.caption:
        return dataclasses.replace(found, reason=Reason.NO_CAPTION)
    if rules.near_distance is not None and is_near_any(
        phash, colour, exclusion, rules.near_distance, rules.near_colour
    ):
        return dataclasses.replace(found, reason=Dropped.EXCLUDED_NEAR)
    return found


def watermark_score(extras: Mapping[str, Any], key: str) -> float | None:
    """The probability of a watermark, None where there is no number in 0..1."""
    value = extras.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) and 0 <= value <= 1 else None


def _judge_watermark(score: float | None, rules: Rules) -> str:
    if rules.watermark_below is None:
        return ""
    if score is None:
        return Dropped.NO_WATERMARK_SCORE if rules.missing_watermark == "drop" else ""
    return "" if score < rules.watermark_below else Dropped.WATERMARK


def _judge_header(data: bytes, rules: Rules, limits: ImageLimits) -> str:
    """What needs no pixels; an aspect ratio that only a rotation by EXIF could save passes."""
    header = inspect_header(data, limits)
    if min(header.width, header.height) <= rules.side_above:
        return Dropped.SHORT_SIDE
    shapes = ((header.width, header.height), (header.height, header.width))
    if not any(_shape_allowed(width, height, rules) for width, height in shapes):
        return Dropped.ASPECT_RATIO
    return ""


def _shape_allowed(width: int, height: int, rules: Rules) -> bool:
    return rules.min_aspect * height <= width <= rules.max_aspect * height


def fingerprint(image: Image.Image) -> tuple[int, bytes]:
    """A perceptual hash of the brightness, and coarse colours.

    Each of the 63 lowest frequencies of the image's 32 x 32 reduction is one bit: above their
    median or not. All arithmetic after Pillow's reduction is on integers, so that every machine
    finds the same bits.

    Args:
        image: Mode "RGB", any size.

    Returns:
        The hash, and the means of a 4 x 4 grid as 48 bytes.
    """
    small = image.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR, reducing_gap=3.0)
    pixels = np.asarray(small).astype(np.int64)  # [32, 32, 3]
    grey = pixels @ np.array([299, 587, 114])
    cosines = _cosines()
    frequencies = (cosines @ grey @ cosines.T).reshape(-1)[1:]  # the mean is no frequency
    bits = frequencies > np.sort(frequencies)[len(frequencies) // 2]
    phash = int("".join("01"[bit] for bit in bits.tolist()), 2)
    cells = pixels.reshape(4, _SIDE // 4, 4, _SIDE // 4, 3).sum(axis=(1, 3)) // (_SIDE // 4) ** 2
    return phash, cells.astype(np.uint8).tobytes()


@functools.cache
def _cosines() -> np.ndarray:
    """The first 8 rows of the cosine transform of 32 values, in integers of 1/1024."""
    rows, columns = np.arange(8)[:, None], np.arange(_SIDE)[None]
    return np.round(1024 * np.cos(np.pi * rows * (columns + 0.5) / _SIDE)).astype(np.int64)


def is_near_any(
    phash: int, colour: bytes, exclusion: Exclusion, distance: int, tolerance: float
) -> bool:
    """Whether the image is a near duplicate of one that `exclusion` names."""
    close = np.flatnonzero(np.bitwise_count(exclusion.hashes ^ np.uint64(phash)) <= distance)
    if not len(close):
        return False
    own = np.frombuffer(colour, np.uint8)
    return bool(_colours_near(exclusion.colours[close], own, tolerance).any())


def bands(phash: int, distance: int) -> Iterator[int]:
    """Keys, at least one of which two hashes share if they differ in at most `distance` bits.

    The hash is cut into distance + 1 pieces; so few differing bits leave one of them untouched.
    """
    count = distance + 1
    edges = [HASH_BITS * i // count for i in range(count + 1)]
    for number, (low, high) in enumerate(itertools.pairwise(edges)):
        piece = phash >> low & ((1 << (high - low)) - 1)
        # With distance 0 the piece is the whole hash: the number goes into the lowest bits.
        yield piece * 8 + number if count > 1 else piece


def first_neighbours(
    hashes: np.ndarray, colours: np.ndarray, distance: int, tolerance: float, block: int = 4096
) -> np.ndarray:
    """For each image the first one before it that is near; -1 where none is.

    Args:
        hashes: uint64 [n].
        colours: uint8 [n, 48].
        distance: Differing bits at most.
        tolerance: Mean difference of the colours at most.
        block: Images compared with so many at once; bounds the memory.

    Returns:
        int64 [n].
    """
    first = np.full(len(hashes), -1, np.int64)
    for start in range(0, len(hashes), 256):
        rows = np.arange(start, min(start + 256, len(hashes)))
        for low in range(0, rows[-1], block):
            others = np.arange(low, min(low + block, rows[-1]))
            rows = rows[first[rows] < 0]
            if not len(rows):
                break
            close = np.bitwise_count(hashes[rows][:, None] ^ hashes[others][None]) <= distance
            close &= others[None] < rows[:, None]
            which, other = np.nonzero(close)  # sorted by row, then by column
            if not len(which):
                continue
            near = _colours_near(colours[rows[which]], colours[others[other]], tolerance)
            found, at = np.unique(which[near], return_index=True)
            first[rows[found]] = others[other[near][at]]
    return first


def _colours_near(a: np.ndarray, b: np.ndarray, tolerance: float) -> np.ndarray:
    difference = np.abs(a.astype(np.int32) - b.astype(np.int32)).sum(axis=-1)
    return difference <= tolerance * COLOUR_VALUES


def shard_of(example_id: str, shards: int) -> int:
    """The shard that an id belongs to, whatever else is in the data."""
    digest = hashlib.sha256(example_id.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") % shards


def account(total: int, kept: int, dropped: Mapping[str, int]) -> None:
    """Checks that every example is in exactly one bucket.

    Raises:
        AssertionError: They do not add up; nothing was lost quietly.
    """
    if kept + sum(dropped.values()) != total:
        raise AssertionError(
            f"{kept} kept and {dict(dropped)} dropped are not the {total} examples of the source"
        )


def exact_duplicates(group: Sequence[tuple[str, int]]) -> Iterator[tuple[int, str]]:
    """Of (id, position)s with the same bytes: the positions to drop, each with the id kept."""
    ordered = sorted(group)
    for _, position in ordered[1:]:
        yield position, ordered[0][0]
