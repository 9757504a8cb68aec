"""Parquet files: an image column (bytes, {bytes, path}, or a path) and a caption column.

Random access reads a whole row group, so the last few stay in memory. For shuffled training over
more than fits there, convert to TFDS first (core_jax.data.convert): that reads each record once.
"""

from __future__ import annotations

import bisect
import collections
import os
import threading
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from core_jax.data.sources import Example, SourceError, checked_relative, list_files


class ParquetSource:
    """Rows of one parquet file, or of all .parquet files in a folder, sorted by name.

    Args:
        path: A file or a folder.
        images: Folder that path entries are relative to; the parquet's own folder where None.
        image_key: Column of the image.
        caption_key: Column of the caption; where None, "caption", else "text", else none.
        id_key: Column of the id; "file.parquet#row" where None. Ids must be unique.
        cached_row_groups: Row groups kept in memory.

    Raises:
        SourceError: No file, a missing column (those there are listed), or an unreadable file.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        images: str | os.PathLike | None = None,
        image_key: str = "image",
        caption_key: str | None = None,
        id_key: str | None = None,
        cached_row_groups: int = 4,
    ):
        self._files = list_files(Path(path), ".parquet")
        self.root = Path(images) if images is not None else self._files[0].parent
        self._image_key, self._id_key = image_key, id_key
        self._cached = max(1, cached_row_groups)
        self._groups: list[tuple[int, int, int]] = []  # (file, row group, first row in the file)
        self._starts: list[int] = []  # of each group, in rows of the whole source
        self._length = 0
        for number, file in enumerate(self._files):
            columns = self._add_file(number, file)
            if number == 0 and caption_key is None:
                caption_key = next((k for k in ("caption", "text") if k in columns), None)
            wanted = [k for k in (image_key, caption_key, id_key) if k is not None]
            missing = [k for k in wanted if k not in columns]
            if missing:
                raise SourceError(f"{file}: no column {missing}; it has {sorted(columns)}")
        self._caption_key = caption_key
        self._open_caches()

    def _add_file(self, number: int, file: Path) -> list[str]:
        try:
            parquet = pq.ParquetFile(file)
        except Exception as error:
            raise SourceError(
                f"{file}: not a readable parquet file ({type(error).__name__})"
            ) from None
        with parquet:
            first = 0
            for group in range(parquet.metadata.num_row_groups):
                self._groups.append((number, group, first))
                self._starts.append(self._length)
                rows = parquet.metadata.row_group(group).num_rows
                first += rows
                self._length += rows
            return parquet.schema_arrow.names

    def _open_caches(self) -> None:
        self._lock = threading.Lock()
        self._tables: collections.OrderedDict[int, Any] = collections.OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_tables")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_caches()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self._length:
            raise IndexError(index)
        group = bisect.bisect_right(self._starts, index) - 1
        file, _, first = self._groups[group]
        offset = index - self._starts[group]
        table = self._table(group)
        row = {name: table.column(name)[offset].as_py() for name in table.column_names}
        where = f"{self._files[file].name}#{first + offset}"
        image = row.pop(self._image_key)
        caption = row.pop(self._caption_key) if self._caption_key else None
        if caption is not None and not isinstance(caption, str):
            raise SourceError(f"{where}: a caption is a text, not {caption!r:.60}")
        name = where if self._id_key is None else str(row.pop(self._id_key))
        image = self._image(image, where)
        return Example(name, image, caption, row, self.root)

    def _image(self, value: Any, where: str) -> bytes | Path | None:
        if isinstance(value, dict):  # the Hugging Face image feature
            value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
        if value is None or isinstance(value, bytes):
            return value
        return self.root / checked_relative(value, self.root, where)

    def _table(self, group: int) -> Any:
        with self._lock:  # a ParquetFile is not safe to share between threads
            if group in self._tables:
                self._tables.move_to_end(group)
                return self._tables[group]
            file, number, _ = self._groups[group]
            with pq.ParquetFile(self._files[file]) as parquet:
                table = parquet.read_row_group(number)
            self._tables[group] = table
            if len(self._tables) > self._cached:
                self._tables.popitem(last=False)
            return table
