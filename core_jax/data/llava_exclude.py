"""Leaving evaluation images out of training, by their ids.

Data sets name one picture differently (`coco/train2017/000000000009.jpg`,
`COCO_train2014_000000000009.jpg`), and LLaVA's mix holds pictures of COCO, GQA and Visual Genome
that are evaluated elsewhere.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from core_jax.data.llava import image_names
from core_jax.data.sources import Example, Source, SourceError, read_json, read_jsonl


def image_key(name: str) -> str:
    """One key for all names of a picture: COCO's number, or the file's name without its suffix."""
    stem = PurePosixPath(str(name).replace("\\", "/")).stem
    match = re.fullmatch(r"(?:COCO_\w+?_)?(\d{12})", stem)
    return f"coco:{int(match.group(1))}" if match else stem


def read_exclusions(path: str | os.PathLike) -> frozenset[str]:
    """Keys of a file: a name a line, a JSON list of names, or a LLaVA-format file.

    Raises:
        SourceError: There is no such file, it names no image, or it is another kind of JSON.
    """
    file = Path(path)
    if not file.is_file():
        raise SourceError(
            f"{file}: no such file of image names to exclude; name the evaluation's questions (or "
            "a list of names), or set the setting to '' to exclude none"
        )
    if file.suffix == ".jsonl":
        found: list[Any] = [record for _, record in read_jsonl(file)]
    elif file.suffix == ".json":
        found = read_json(file)
    else:
        lines = file.read_text(encoding="utf-8").splitlines()
        found = [line.strip() for line in lines]
    if not isinstance(found, list):
        raise SourceError(f"{file}: a list of names (or of records with `image`)")
    names = [name for n in found for name in (image_names(n) if isinstance(n, dict) else [n])]
    keys = frozenset(image_key(n) for n in names if n)
    if not keys:
        raise SourceError(f"{file} names no image; leave the setting empty to exclude none")
    return keys


class Subset:
    """Some examples of a source.

    Attributes:
        indices: Which, in order.

    Args:
        source: The whole.
        indices: Which, in order.
    """

    def __init__(self, source: Source, indices: Sequence[int]):
        self._source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._source[self.indices[index]]


def without_images(source: Source, keys: Collection[str]) -> tuple[Subset, int]:
    """The examples that show none of these pictures, and how many were left out.

    Sources with `image_names(index)` are looked through at once; of others every record is read.

    Args:
        source: Where examples come from.
        keys: See `read_exclusions`.

    Raises:
        SourceError: Nothing is left.
    """

    def names(index: int) -> Sequence[str]:
        if hasattr(source, "image_names"):
            return source.image_names(index)  # type: ignore[attr-defined]
        example = source[index]
        return example.extras.get("image_names") or [example.id]

    kept = [i for i in range(len(source)) if not any(image_key(n) in keys for n in names(i))]
    if not kept:
        raise SourceError(f"all {len(source)} examples show excluded images; nothing is left")
    return Subset(source, kept), len(source) - len(kept)
