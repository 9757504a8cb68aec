"""A folder of image files, with or without captions.

Captions come from a manifest, JSONL with one object a line: `file_name` or `image` (relative to the
folder), `caption` or `text`, optionally `id`; other keys become extras. A folder that holds a
`metadata.jsonl` (the Hugging Face ImageFolder convention) uses it by itself. A manifest may also be
a JSON list of file names or of such objects, as the released VLV training script reads. Or the text
file beside each image is its caption (`caption_suffix=".txt"`): `a.jpg.txt`, else `a.txt`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from core_jax.data.sources import (
    IMAGE_SUFFIXES,
    Example,
    SourceError,
    checked_relative,
    clean_text,
    read_json,
    read_jsonl,
    unique_ids,
    walk_files,
)

_IMAGE_KEYS = ("file_name", "image", "file", "path")
_CAPTION_KEYS = ("caption", "text")


class FolderSource:
    """Image files under a root, in sorted order or in the order of a manifest.

    Args:
        path: A folder (searched recursively), one image file, or a manifest file.
        manifest: A .jsonl file, or a .json list; its images only are used.
        images: Root of the manifest's paths; the folder, or the manifest's own folder, where None.
        caption_suffix: Suffix of the text file beside an image.
        follow_symlinks: Accept links that lead out of the root, and enter linked folders.

    Raises:
        SourceError: Nothing there, no image found, or a manifest entry that is malformed or leads
            out of the root (the first of them are listed).
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        manifest: str | os.PathLike | None = None,
        images: str | os.PathLike | None = None,
        caption_suffix: str | None = None,
        follow_symlinks: bool = False,
    ):
        path = Path(path)
        if not path.exists():
            raise SourceError(f"{path}: no such file or folder")
        if manifest is None and path.is_file() and path.suffix.lower() in (".json", ".jsonl"):
            manifest, path = path, path.parent
        elif manifest is None and path.is_dir() and (path / "metadata.jsonl").is_file():
            manifest = path / "metadata.jsonl"
        if images is not None and manifest is None:
            raise SourceError("`images` goes with a manifest; for a plain folder it is `path`")
        self._caption_suffix = caption_suffix
        self._check_links = not follow_symlinks
        self._records: list[dict[str, Any]] | None = None
        if manifest is not None:
            self.root = Path(images) if images is not None else path
            self._names, self._records = _read_manifest(Path(manifest), self.root)
            declared = [record.pop("id", None) for record in self._records]
            names = [n if d is None else str(d) for n, d in zip(self._names, declared, strict=True)]
            self._ids = unique_ids(map(clean_text, names))
        elif path.is_file():
            self.root, self._names = path.parent, [path.name]
            self._ids = [clean_text(path.name)]
        else:
            self.root, self._names = path, _scan(path, follow_symlinks)
            self._ids = unique_ids(map(clean_text, self._names))
        if not self._names:
            raise SourceError(f"{manifest or path}: no image ({', '.join(IMAGE_SUFFIXES)})")

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Example:
        image = self.root / self._names[index]
        extras = dict(self._records[index]) if self._records is not None else {}
        caption = extras.pop("caption", None)
        if caption is None and self._caption_suffix is not None:
            caption = _caption_beside(image, self._caption_suffix)
        root = self.root if self._check_links else None
        return Example(self._ids[index], image, caption, extras, root)


def _caption_beside(image: Path, suffix: str) -> str | None:
    """The text of `a.jpg` in `a.jpg.txt`, else in `a.txt`.

    Beside `a.jpg.png`, `a.jpg.txt` is not its own where there is an image `a.jpg`.
    """
    files = [image.with_name(image.name + suffix)]
    other = image.with_suffix("")
    if other.suffix.lower() not in IMAGE_SUFFIXES or not other.is_file():
        files.append(image.with_suffix(suffix))
    text = next((file for file in files if file.is_file()), None)
    if text is None:
        return None
    return text.read_text(encoding="utf-8", errors="replace").strip()


def _scan(root: Path, follow_symlinks: bool) -> list[str]:
    return sorted(
        str(file.relative_to(root))
        for file in walk_files(root, follow_symlinks=follow_symlinks)
        if file.name.lower().endswith(IMAGE_SUFFIXES)
    )


def _read_manifest(path: Path, root: Path) -> tuple[list[str], list[dict[str, Any]]]:
    if path.suffix.lower() == ".jsonl":
        entries = [(f"{path}:{number}", record) for number, record in read_jsonl(path)]
    else:
        parsed = read_json(path)
        if not isinstance(parsed, list):
            raise SourceError(f"{path}: a manifest is a list, not {type(parsed).__name__}")
        entries = [(f"{path}[{i}]", entry) for i, entry in enumerate(parsed)]
    names, records, problems = [], [], []
    for where, entry in entries:
        try:
            name, record = _read_entry(entry, root, where)
            names.append(name)
            records.append(record)
        except SourceError as error:
            problems.append(str(error))
    if problems:
        shown = "\n  ".join(problems[:10])
        raise SourceError(f"{path}: {len(problems)} bad entries, the first of them:\n  {shown}")
    return names, records


def _read_entry(entry: Any, root: Path, where: str) -> tuple[str, dict[str, Any]]:
    if isinstance(entry, str):
        return checked_relative(entry, root, where), {}
    if not isinstance(entry, dict):
        raise SourceError(f"{where}: an entry is a file name or an object, not {entry!r:.60}")
    record = dict(entry)
    image_key = next((key for key in _IMAGE_KEYS if key in record), None)
    if image_key is None:
        raise SourceError(f"{where}: none of {_IMAGE_KEYS} in {sorted(record)}")
    name = checked_relative(record.pop(image_key), root, where)
    caption_key = next((key for key in _CAPTION_KEYS if key in record), None)
    caption = record.pop(caption_key) if caption_key else None
    if caption is not None and not isinstance(caption, str):
        raise SourceError(f"{where}: a caption is a text, not {caption!r:.60}")
    return name, record | {"caption": caption}
