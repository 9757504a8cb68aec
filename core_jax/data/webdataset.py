"""Webdataset tars as img2dataset writes them: 000000.tar with 000000000.jpg, .txt and .json.

Members that share the name up to the first dot are one sample, as webdataset has it. Plain tars of
pictures have other names: where no member is the sample's plain image (`x.jpg`), the name of one
like `IMG_2020.01.05.jpg` goes up to its last dot; beside a plain image, `x.seg.png` is a further
field of x, which is counted and left out. Of `a.jpg` and `a.png`, the second is the sample `a.png`,
with the text of `a`.

An index of offsets is built once from the tar headers and kept beside each tar (or in `cache_dir`),
so any sample is one read away and shuffling is global; nothing is ever unpacked.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from core_jax.data.sources import IMAGE_SUFFIXES, EmptySourceError, Example, SourceError, list_files

_VERSION = 3
_PARTS = ("image", "txt", "json")


class WebdatasetSource:
    """Samples of one tar, or of all tars in a folder, sorted by name.

    A sample without an image stays in the count and gets the reason "no_image". The caption is the
    .txt member, else "caption" in the .json member; the .json member becomes the extras.

    Args:
        path: A .tar file or a folder of them. Compressed tars allow no random access.
        cache_dir: Where index files go; beside the tars where None. A folder that cannot be
            written to costs nothing but a new scan of the headers at every start.

    Attributes:
        left_out: Images that are further fields of samples, such as `x.seg.png` beside `x.png`.

    Raises:
        SourceError: No tar, or broken ones: all of them are listed.
    """

    def __init__(self, path: str | os.PathLike, *, cache_dir: str | os.PathLike | None = None):
        self._files = list_files(Path(path), ".tar")
        cache = Path(cache_dir) if cache_dir is not None else None
        indices, problems = [], []
        for file in self._files:
            try:
                indices.append(_load_index(file, cache))
            except (tarfile.TarError, EOFError, OSError) as error:
                problems.append(f"{file}: {type(error).__name__}")
        if problems:
            raise SourceError(
                "tars that cannot be read to their end (an interrupted download leaves them so); "
                "make or fetch them again, or move them away:\n  " + "\n  ".join(problems)
            )
        self._keys = [index["keys"] for index in indices]
        self._spans = [index["spans"] for index in indices]
        self.left_out = sum(int(index["left_out"]) for index in indices)
        self._ends = np.cumsum([len(keys) for keys in self._keys])
        if not len(self):
            raise EmptySourceError(f"{path}: the tars hold no sample")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def key(self, index: int) -> str:
        """The sample's name inside its tar; nothing is read."""
        shard, row = self._locate(index)
        return _text(self._keys[shard][row])

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - int(self._ends[shard]) + len(self._keys[shard])

    def __getitem__(self, index: int) -> Example:
        shard, row = self._locate(index)
        key = _text(self._keys[shard][row])
        spans = self._spans[shard][row]  # [3 parts, (offset, size)], offset -1 where absent
        image, text, meta = self._read(self._files[shard], spans)
        extras = _parse_json(meta)
        caption = text.decode("utf-8", errors="replace").strip() if text is not None else None
        if caption is None and isinstance(extras.get("caption"), str):
            caption = extras["caption"]
        return Example(f"{self._files[shard].stem}/{key}", image, caption, extras)

    def _read(self, file: Path, spans: np.ndarray) -> list[bytes | None]:
        # pread has no position to share, so threads need no lock.
        descriptor = os.open(file, os.O_RDONLY)
        try:
            return [
                os.pread(descriptor, int(size), int(offset)) if offset >= 0 else None
                for offset, size in spans
            ]
        finally:
            os.close(descriptor)


def _text(key: bytes) -> str:
    """A name that is not UTF-8 keeps its bytes as escapes, so that it stays distinct."""
    return key.decode("utf-8", "backslashreplace")


def _parse_json(data: bytes | None) -> dict[str, Any]:
    try:
        parsed = json.loads(data) if data is not None else {}
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def scan_tar(file: Path) -> dict[str, np.ndarray]:
    """Reads the headers of a tar.

    Returns:
        "keys": bytes [n], in the order of their first member; "spans": int64 [n, 3, 2], the offset
        and size in bytes of the image, .txt and .json members, -1 where there is none; "left_out":
        int [], how many images are further fields.

    Raises:
        tarfile.TarError: Not a tar, compressed, or ending early.
    """
    members: list[tuple[str, tuple[int, int]]] = []
    size = file.stat().st_size
    with tarfile.open(file, "r:") as tar:
        for member in tar:
            if not member.isreg():
                continue  # links and devices are of no use, and could lead elsewhere
            base = member.name.rpartition("/")[2]
            if base.startswith(".") or _part(os.path.splitext(base)[1]) is None:
                continue
            if member.offset_data + member.size > size:
                raise tarfile.ReadError("unexpected end of data")
            members.append((member.name, (member.offset_data, member.size)))
    rows, left_out = _group(members)
    keys = np.array([key.encode("utf-8", "surrogateescape") for key in rows], dtype=np.bytes_)
    spans = np.array(list(rows.values()), dtype=np.int64).reshape(-1, 3, 2)
    return {"keys": keys, "spans": spans, "left_out": np.array(left_out)}


def _group(
    members: list[tuple[str, tuple[int, int]]],
) -> tuple[dict[str, np.ndarray], int]:
    """Samples by their keys, and how many images are further fields, of (name, span) pairs."""
    names = [name for name, _ in members]
    plain = {_split(n, last=False)[0] for n in names if _part(_split(n, last=False)[1]) == 0}
    dotted = {
        _split(n, last=True)[0]
        for n in names
        if _part(_split(n, last=True)[1]) == 0 and _split(n, last=False)[0] not in plain
    }
    rows: dict[str, np.ndarray] = {}
    further: list[tuple[str, str, tuple[int, int]]] = []  # (key, key of its sample, span)
    left_out = 0
    for name, span in members:
        key, suffix = _split(name, last=False)
        if _part(suffix) is None:
            key, suffix = _split(name, last=True)
            if key not in dotted:
                left_out += _part(suffix) == 0
                continue
        part = _part(suffix)
        row = rows.setdefault(key, np.full((3, 2), -1))
        if row[part, 0] < 0:
            row[part] = span
        elif part == 0:
            further.append((name, key, span))
    for name, key, span in further:
        new = next(n for n in _numbered(name) if n not in rows)
        rows[new] = rows[key].copy()
        rows[new][0] = span
    return rows, left_out


def _split(name: str, *, last: bool) -> tuple[str, str]:
    """A member's name before its first (or last) dot, and the suffix from there on."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.rpartition(".") if last else base.partition(".")
    return f"{folder}{slash}{stem}", f".{suffix}"


def _numbered(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}#{number}" for number in itertools.count(2))


def _part(suffix: str) -> int | None:
    suffix = suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return 0
    return {".txt": 1, ".json": 2}.get(suffix)


def _load_index(file: Path, cache_dir: Path | None) -> Mapping[str, np.ndarray]:
    stat = file.stat()
    stamp = np.array([_VERSION, stat.st_size, stat.st_mtime_ns], dtype=np.int64)
    if cache_dir is None:
        path = file.with_name(file.name + ".index.npz")
    else:
        tag = hashlib.sha256(os.path.abspath(file).encode()).hexdigest()[:16]
        path = cache_dir / f"{file.stem}-{tag}.index.npz"
    try:
        with np.load(path, allow_pickle=False) as saved:
            if np.array_equal(saved["stamp"], stamp):
                return {name: saved[name] for name in ("keys", "spans", "left_out")}
    except (OSError, ValueError, KeyError, EOFError):
        pass  # none yet, or of another version or tar: built again below
    index = scan_tar(file)
    _save_atomically(path, {"stamp": stamp, **index})
    return index


def _save_atomically(path: Path, arrays: dict[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Several processes may index the same tar at once; the last whole file wins.
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as out:
            temporary = out.name
            out.write(buffer.getvalue())
        os.replace(temporary, path)
    except OSError:  # read-only or full: the index is only a cache
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
