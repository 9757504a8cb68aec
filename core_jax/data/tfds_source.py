"""TFDS datasets in ArrayRecord, without TensorFlow: the native road.

Images are read as the encoded bytes that the dataset stores and decoded by this project, so that
every image has the fate of docs/data.md whatever its source.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from core_jax.data.sources import Example, SourceError

# The feature in which converted datasets keep what a source knows beside image and caption.
EXTRAS_KEY = "extras_json"


class TfdsSource:
    """One split of a prepared TFDS dataset.

    Args:
        path: A version folder (it holds dataset_info.json), a folder with exactly one such folder
            below it, or, with `name`, the data_dir.
        name: Registered name, optionally with config and version ("coco_captions/2014:1.1.0").
        split: A split; slices are allowed ("train[:10%]").
        image_key: Feature of the image, an Image feature; "a/b" goes into a dictionary.
        caption_key: Feature of the caption. Where it is a sequence ("captions/text" of
            coco_captions) the first is the caption and `extras["captions"]` has all. Where None,
            "caption", "text" or "captions/text", whichever there is.
        id_key: Feature of the id; where None "id" or "image/id" if there, else split and position.

    Raises:
        SourceError: Not prepared, not ArrayRecord, no such split or feature (those there are
            listed).
    """

    def __init__(
        self,
        path: str | os.PathLike | None = None,
        *,
        name: str | None = None,
        split: str = "train",
        image_key: str = "image",
        caption_key: str | None = None,
        id_key: str | None = None,
    ):
        import tensorflow_datasets as tfds  # half a second: only for who uses it

        builder = _builder(tfds, path, name)
        self.name, self.split = builder.info.full_name, split
        features = _flat(builder.info.features)
        if image_key not in features:
            raise SourceError(f"{self.name}: no feature {image_key!r}; it has {sorted(features)}")
        for key in (caption_key, id_key):
            if key is not None and key not in features:
                raise SourceError(f"{self.name}: no feature {key!r}; it has {sorted(features)}")
        self._image_key = image_key
        self._caption_key = caption_key or _first(features, "caption", "text", "captions/text")
        self._id_key = id_key or _first(features, "id", "image/id")
        if not builder.info.splits:
            raise SourceError(
                f"{self.name}: not prepared; run `tfds build` or core_jax.data.convert"
            )
        self._info = builder.info
        decoders: Any = tfds.decode.SkipDecoding()
        for part in reversed(_parts(builder.info.features, image_key)):
            decoders = {part: decoders}
        try:
            self._records = builder.as_data_source(split, decoders=decoders)
        except (NotImplementedError, ValueError) as error:
            raise SourceError(
                f"{self.name}: split {split!r} cannot be read at random ({error}); it must be one "
                f"of {sorted(builder.info.splits)}, prepared with file_format='array_record'"
            ) from None

    def __len__(self) -> int:
        return len(self._records)

    @property
    def fingerprint(self) -> str:
        """What tells this split from another without reading it: name, files and their sizes."""
        files = self._info.splits[self.split].filepaths
        sizes = [(os.path.basename(file), os.path.getsize(file)) for file in files]
        return f"{self.name} {self.split} {sizes}"

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        values = _flat(self._records[index])
        image = values.pop(self._image_key)
        extras = {key: _plain(value) for key, value in values.items()}
        if EXTRAS_KEY in extras:  # a dataset that core_jax.data.convert wrote
            extras |= json.loads(extras.pop(EXTRAS_KEY))
        caption = (extras.pop(self._caption_key) or None) if self._caption_key else None
        if isinstance(caption, list):
            extras["captions"] = caption
            caption = caption[0] if caption else None
        example_id = extras.pop(self._id_key) if self._id_key else f"{self.split}#{index}"
        return Example(str(example_id), bytes(image) or None, caption, extras)


def _builder(tfds: Any, path: str | os.PathLike | None, name: str | None) -> Any:
    if name is not None:
        try:
            data_dir = None if path is None else os.fspath(path)
            return tfds.builder(name, data_dir=data_dir, file_format="array_record")
        except Exception as error:
            raise SourceError(f"TFDS dataset {name!r}: {type(error).__name__}: {error}") from None
    if path is None:
        raise SourceError("a 'tfds' source needs `path` (a version folder) or `name`")
    folders = [Path(path)]
    if not (folders[0] / "dataset_info.json").is_file():
        folders = sorted(p.parent for p in Path(path).glob("**/dataset_info.json"))
    if len(folders) != 1:
        raise SourceError(
            f"{path}: expected one version folder with dataset_info.json, found "
            f"{[str(folder) for folder in folders]}; name it, or prepare the dataset first"
        )
    return tfds.builder_from_directory(os.fspath(folders[0]))


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": x}} to {"a/b": x}; sequences of dictionaries are entered too."""
    flat: dict[str, Any] = {}
    for key in tree:
        inner = tree[key]
        inner = getattr(inner, "feature", inner) if not isinstance(inner, Mapping) else inner
        if hasattr(inner, "keys"):
            flat |= _flat(inner, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = inner
    return flat


def _parts(features: Any, key: str) -> list[str]:
    """Splits "a/b" into its path; "image/id" may also be the plain name of one feature."""
    if key in features:
        return [key]
    head, _, rest = key.partition("/")
    return [head, *_parts(features[head], rest)]


def _first(features: Mapping[str, Any], *keys: str) -> str | None:
    return next((key for key in keys if key in features), None)


def _plain(value: Any) -> Any:
    """TFDS gives text as bytes and numbers as numpy scalars."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if isinstance(value, np.ndarray) and value.dtype == object:
        return [_plain(item) for item in value.tolist()]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
