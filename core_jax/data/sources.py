"""What a data source is, and how a config names one.

A source is a sequence of examples with random access: `len(source)`, `source[i]`. It never decodes
an image, holds no iterator state, can be pickled, and is safe to read from several threads, so the
position in the data can be a plain number. One file a kind.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, runtime_checkable

from core_jax.data.images import BadImage, ImageLimits, Reason, read_bytes

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class SourceError(ValueError):
    """A source cannot be opened as asked; the message names the file and the remedy."""


class EmptySourceError(SourceError):
    """A source is readable and holds no example."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One record, its image not yet decoded.

    Id and caption are valid Unicode, whatever bytes a file's name has and whatever JSON escapes:
    what is none becomes backslash escapes (`clean_text`). So they can be written and tokenized.

    Attributes:
        id: Unique within the source and stable across runs.
        image: Encoded bytes, the path of a file, or None where the record has none.
        caption: The text, or None where the record has none.
        extras: Everything else the source knows, JSON-like.
        root: The folder that `image` must stay in, links resolved, when it is a path.
    """

    id: str
    image: bytes | Path | None
    caption: str | None = None
    extras: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    root: Path | None = None

    def __post_init__(self):
        object.__setattr__(self, "id", clean_text(self.id))
        if self.caption is not None:
            object.__setattr__(self, "caption", clean_text(self.caption))

    def encoded_image(self, limits: ImageLimits | None = None) -> bytes:
        """The encoded bytes of the image, read from its file where it is a path.

        Raises:
            BadImage: NO_IMAGE, OUTSIDE_ROOT, MISSING_FILE, EMPTY or TOO_MANY_BYTES.
        """
        if self.image is None:
            raise BadImage(Reason.NO_IMAGE)
        if self.root is not None and isinstance(self.image, Path):
            root = os.path.realpath(self.root)
            if os.path.commonpath([os.path.realpath(self.image), root]) != root:
                raise BadImage(Reason.OUTSIDE_ROOT)
        return read_bytes(self.image, limits or ImageLimits())


@runtime_checkable
class Source(Protocol):
    """A sequence of examples; see the module's docstring for what is promised."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def __getitem__(self, index: int) -> Example:
        """The example at `index`, 0 <= index < len(self)."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """Names a source in a config. A field that the kind has no use for must stay unset.

    Attributes:
        kind: "folder", "parquet", "webdataset", "coco", "llava", "tfds", or "auto" to tell from
            `path` ("llava" must be said).
        path: Folder or file; for "tfds" a prepared version folder, or the data_dir of `name`.
        name: tfds: registered name of the dataset.
        split: tfds: a split, slices allowed ("train[:10%]").
        manifest: folder: a JSONL file, or a JSON list, of the images to use and their captions.
        images: folder with manifest, parquet, coco, llava: the folder that image paths are
            relative to.
        image_key: parquet, tfds: column or feature of the image; "a/b" goes into a dictionary.
        caption_key: parquet, tfds: column or feature of the caption.
        id_key: parquet, tfds: column or feature of the id; file and row where None.
        captions: coco: "all" (an example a caption) or "first" (an example an image).
        caption_suffix: folder: reads the caption from the text file beside the image (".txt").
        follow_symlinks: folder, llava: accept links that lead out of the folder.
        cache_dir: webdataset: where the index goes; beside the tars where None.
    """

    kind: str = "auto"
    path: str | None = None
    name: str | None = None
    split: str | None = None
    manifest: str | None = None
    images: str | None = None
    image_key: str | None = None
    caption_key: str | None = None
    id_key: str | None = None
    captions: str | None = None
    caption_suffix: str | None = None
    follow_symlinks: bool | None = None
    cache_dir: str | None = None


# kind -> (module, class, fields it takes). A plain table, so that a reader can search for it.
_KINDS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "folder": (
        "core_jax.data.folder",
        "FolderSource",
        ("path", "manifest", "images", "caption_suffix", "follow_symlinks"),
    ),
    "parquet": (
        "core_jax.data.parquet",
        "ParquetSource",
        ("path", "images", "image_key", "caption_key", "id_key"),
    ),
    "webdataset": ("core_jax.data.webdataset", "WebdatasetSource", ("path", "cache_dir")),
    "coco": ("core_jax.data.coco", "CocoSource", ("path", "images", "captions")),
    "llava": ("core_jax.data.llava", "LlavaSource", ("path", "images", "follow_symlinks")),
    "tfds": (
        "core_jax.data.tfds_source",
        "TfdsSource",
        ("path", "name", "split", "image_key", "caption_key", "id_key"),
    ),
}


def open_source(spec: SourceSpec) -> Source:
    """Opens the source that `spec` names.

    Raises:
        SourceError: An unknown kind, a field the kind does not use, or a source that is not there
            or not as it should be; EmptySourceError where it holds no example.
    """
    kind = infer_kind(spec) if spec.kind == "auto" else spec.kind
    if kind not in _KINDS:
        raise SourceError(f"source kind {kind!r} is not one of {sorted(_KINDS)} or 'auto'")
    module, name, fields = _KINDS[kind]
    given = {
        field.name: getattr(spec, field.name)
        for field in dataclasses.fields(spec)
        if field.name != "kind" and getattr(spec, field.name) is not None
    }
    unused = sorted(set(given) - set(fields))
    if unused:
        raise SourceError(f"a {kind!r} source has no use for {unused}; it takes {list(fields)}")
    if kind != "tfds" and "path" not in given:
        raise SourceError(f"a {kind!r} source needs `path`")
    source: Source = getattr(importlib.import_module(module), name)(**given)
    if not len(source):
        where = ", ".join(f"{field}={given[field]}" for field in given)
        raise EmptySourceError(f"a {kind!r} source without an example: {where}")
    return source


def infer_kind(spec: SourceSpec) -> str:
    """Tells the kind from what lies at `spec.path`.

    Raises:
        SourceError: Nothing is there, or it is nothing known.
    """
    if spec.name is not None:
        return "tfds"
    if spec.path is None:
        raise SourceError("a source needs `path` (or `name` of a TFDS dataset)")
    path = Path(spec.path)
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix in (".parquet", ".tar"):
            return {".parquet": "parquet", ".tar": "webdataset"}[suffix]
        if suffix == ".json" and path.name.startswith("captions_"):
            return "coco"
        if suffix in (".json", ".jsonl", *IMAGE_SUFFIXES):
            return "folder"
        raise SourceError(f"{path}: cannot tell the kind of source; known: {sorted(_KINDS)}")
    if not path.is_dir():
        raise SourceError(f"{path}: no such file or folder")
    if (path / "dataset_info.json").is_file():
        return "tfds"
    suffixes = {os.path.splitext(name)[1] for name in os.listdir(path)}
    for suffix, kind in ((".tar", "webdataset"), (".parquet", "parquet")):
        if suffix in suffixes:
            return kind
    return "folder"


def checked_relative(name: Any, root: Path, where: str) -> str:
    """A path out of a manifest, relative to `root` and inside it, in posix form.

    Only the text is checked here (a million entries must not cost a million file-system calls);
    links are checked when the image is read.

    Raises:
        SourceError: Not a text, empty, or leading out of `root`.
    """
    if not isinstance(name, str) or not name:
        raise SourceError(f"{where}: an image path is a non-empty text, not {name!r}")
    text = name
    if os.path.isabs(text):
        try:
            text = str(Path(os.path.normpath(text)).relative_to(os.path.abspath(root)))
        except ValueError:
            raise SourceError(f"{where}: {name!r} lies outside {root}") from None
    text = os.path.normpath(text)
    if text == "." or PurePosixPath(text).parts[0] == ".." or "\0" in text:
        raise SourceError(f"{where}: {name!r} leads out of {root}")
    return text


def read_json(path: Path) -> Any:
    """Parses a JSON file; a SourceError names it where it is not one."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise SourceError(f"{path}: no such file") from None
    except ValueError as error:
        raise SourceError(f"{path}: not valid JSON ({error})") from None


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, object); a SourceError names the line that is not one."""
    try:
        lines = path.open("rb")
    except FileNotFoundError:
        raise SourceError(f"{path}: no such file") from None
    with lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:  # some editors begin a file with a byte order mark
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except ValueError as error:
                raise SourceError(f"{path}:{number}: not valid JSON ({error})") from None
            if not isinstance(record, dict):
                raise SourceError(f"{path}:{number}: a line is an object, not {record!r:.60}")
            yield number, record


def walk_files(root: Path, *, follow_symlinks: bool = True) -> Iterator[Path]:
    """Every file below a folder that is not hidden, in no special order.

    Linked folders are entered after the others, and none is entered twice, so that links may form
    circles, and what lies in the folder itself is found under its own name. Without
    `follow_symlinks` they are left out, and the log says how many.
    """
    waiting, entered, linked = [root], set(), 0
    while waiting:
        for folder, folders, files in os.walk(waiting.pop(0)):
            real = os.path.realpath(folder)
            if real in entered:
                folders.clear()
                continue
            entered.add(real)
            folders.sort()
            yield from (Path(folder, name) for name in files if not name.startswith("."))
            links = [Path(folder, name) for name in folders if os.path.islink(Path(folder, name))]
            linked += len(links)
            waiting += links if follow_symlinks else []
    if linked and not follow_symlinks:
        logger.warning("%s: %d linked folders are left out (follow_symlinks)", root, linked)


def clean_text(text: str) -> str:
    """Valid Unicode: undecodable parts of names become backslash escapes, which stay distinct."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def unclean_name(text: str) -> str:
    """The file name that `clean_text` made `text` of."""
    return re.sub(r"\\u(dc[89a-f][0-9a-f])", lambda found: chr(int(found[1], 16)), text)


def unique_ids(names: Iterable[str]) -> list[str]:
    """Makes ids unique: the second "a.jpg" becomes "a.jpg#2", the third "a.jpg#3"."""
    seen: dict[str, int] = {}
    ids = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        ids.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return ids


def list_files(path: Path, suffix: str) -> list[Path]:
    """The file itself, or all files of that suffix directly in a folder, sorted.

    Raises:
        SourceError: There is none.
    """
    files = [path] if path.is_file() else sorted(path.glob(f"*{suffix}"))
    files = [file for file in files if file.is_file()]
    if not files:
        raise SourceError(f"{path}: no {suffix} file")
    return files
