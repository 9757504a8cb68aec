"""COCO captions as downloaded: captions_val2014.json and the folder of images."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from core_jax.data.sources import Example, SourceError, checked_relative, read_json


class CocoSource:
    """Images of a COCO captions file with their captions.

    Args:
        path: The annotation file, or a folder that holds exactly one `captions_*.json`.
        images: The image folder; where None, the folder named as the split ("val2014") beside the
            annotation file or beside its folder, as the archives unpack.
        captions: "all" gives an example a caption (id "image#annotation"), "first" an example an
            image (id "image", the caption of the lowest annotation id). Every example has
            `extras["captions"]`, all captions of its image: the references that metrics need.

    Raises:
        SourceError: A missing file or folder, or a file that is not of this format.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        images: str | os.PathLike | None = None,
        captions: str = "all",
    ):
        if captions not in ("all", "first"):
            raise SourceError(f"coco: captions is {captions!r}; it is 'all' or 'first'")
        file = _annotation_file(Path(path))
        self.root = Path(images) if images is not None else _image_folder(file)
        if not self.root.is_dir():
            raise SourceError(f"{self.root}: no such image folder; give `images`")
        parsed = read_json(file)
        if not isinstance(parsed, dict) or not {"images", "annotations"} <= set(parsed):
            raise SourceError(f"{file}: a COCO file has the keys 'images' and 'annotations'")
        by_image: dict[int, list[tuple[int, str]]] = {}
        self._images: list[tuple[int, str, dict[str, Any]]] = []
        try:
            for note in parsed["annotations"]:
                pair = (note["id"], str(note["caption"]).strip())
                by_image.setdefault(note["image_id"], []).append(pair)
            for entry in sorted(parsed["images"], key=lambda entry: entry["id"]):
                name = checked_relative(entry["file_name"], self.root, f"{file}: {entry['id']}")
                self._images.append((entry["id"], name, entry))
        except (KeyError, TypeError) as error:
            raise SourceError(f"{file}: an entry lacks {error}") from None
        self._captions = {key: sorted(pairs) for key, pairs in by_image.items()}
        self._examples = [  # (image, caption or -1)
            (i, j)
            for i, (image_id, _, _) in enumerate(self._images)
            for j in self._choices(image_id, captions)
        ]
        self._all = captions == "all"
        if not self._examples:
            raise SourceError(f"{file}: no image")

    def _choices(self, image_id: int, captions: str) -> range:
        count = len(self._captions.get(image_id, ()))
        if count == 0:
            return range(-1, 0)  # kept, without a caption: the policy decides
        return range(count if captions == "all" else 1)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        i, j = self._examples[index]
        image_id, name, entry = self._images[i]
        pairs = self._captions.get(image_id, [])
        extras = {"image_id": image_id, "captions": [text for _, text in pairs]}
        extras |= {key: entry[key] for key in ("width", "height") if key in entry}
        note_id, caption = pairs[j] if j >= 0 else (None, None)
        name_of = f"{image_id}#{note_id}" if self._all and j >= 0 else str(image_id)
        return Example(name_of, self.root / name, caption, extras, self.root)


def _annotation_file(path: Path) -> Path:
    if path.is_file():
        return path
    found = sorted(path.glob("captions_*.json")) or sorted(path.glob("annotations/captions_*.json"))
    if len(found) != 1:
        names = [file.name for file in found]
        raise SourceError(f"{path}: expected one captions_*.json, found {names}; give the file")
    return found[0]


def _image_folder(file: Path) -> Path:
    split = file.stem.removeprefix("captions_")
    for parent in (file.parent, file.parent.parent):
        for name in (split, f"images/{split}"):
            if (parent / name).is_dir():
                return parent / name
    return file.parent / split
