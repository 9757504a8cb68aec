"""One preparation: its files and units of work, each of which is done once and survives a kill.

A source is cut into parts (a tar or a parquet file each, or the whole source), parts into units of
some thousand examples. Counting a part, looking at a unit and writing a shard each leave one file,
written under another name and renamed; a file that is there is work that is done. Without Apache
Beam: core_jax.data.prepare_pipeline only spreads these units over workers.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from core_jax.data.convert import ShardWriter, is_whole
from core_jax.data.images import ImageLimits
from core_jax.data.prepare_rules import (
    COLOUR_VALUES,
    Dropped,
    Exclusion,
    Look,
    Rules,
    account,
    first_neighbours,
    look_at,
)  # fmt: skip
from core_jax.data.sources import (
    EmptySourceError,
    Example,
    Source,
    SourceError,
    SourceSpec,
    infer_kind,
    list_files,
    open_source,
)  # fmt: skip
from core_jax.files import write_whole


class PrepareError(ValueError):
    """It cannot be prepared as asked; the message says what to do."""


# (position, id, reason or "", score missing, sha256, hash, colour, width, height): plain values,
# because every runner can encode them.
Record = tuple[int, str, str, bool, bytes, int, bytes, int, int]
# (position, reason, id of the example that is kept in its place)
Drop = tuple[int, str, str]


@dataclasses.dataclass(frozen=True)
class Unit:
    """Examples [start, stop) of a part; `position` of the first in the whole source."""

    number: int
    part: int
    start: int
    stop: int
    position: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that a worker must know; small, and can be pickled.

    Attributes:
        parts: Sources, in order.
        path: The version folder.
        name: Of the dataset.
        split: Of the dataset.
        rules: What is kept.
        limits: Of the images.
        threads: Threads that read and decode in each worker process.
    """

    parts: tuple[SourceSpec, ...]
    path: Path
    name: str
    split: str
    rules: Rules
    limits: ImageLimits
    threads: int = 2

    @property
    def work(self) -> Path:
        """The folder of what is done so far."""
        return self.path / f".prepare-{self.split}"

    @property
    def dropped_folder(self) -> Path:
        """The folder of what was dropped and why, one JSONL file a shard."""
        return self.path / f"prepare-{self.split}-dropped"

    # Counting.

    def count(self, part: int) -> None:
        """Opens a part; leaves its length, or what is wrong with it."""
        file = self.count_file(part)
        if not file.exists():
            try:
                result: dict[str, Any] = {"length": len(open_part(self.parts[part]))}
            except EmptySourceError:
                result = {"length": 0}
            except SourceError as error:
                result = {"problem": str(error)}
            write_into(file, json.dumps(result).encode())

    def count_file(self, part: int) -> Path:
        """Where the length of a part is kept."""
        return self.work / "parts" / f"{part:06d}.json"

    # Looking.

    def look(self, unit: Unit) -> None:
        """Judges the examples of a unit one by one; leaves what it found."""
        file = self.look_file(unit)
        if file.exists():
            return
        source, exclusion = open_part(self.parts[unit.part]), load_exclusion(self.work)

        def judge(index: int) -> Look:
            return look_at(source[index], self.rules, self.limits, exclusion)

        with ThreadPoolExecutor(self.threads) as pool:
            looks = list(pool.map(judge, range(unit.start, unit.stop)))
        fields = [field.name for field in dataclasses.fields(Look)]
        table = pa.table({name: [getattr(look, name) for look in looks] for name in fields})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        write_into(file, sink.getvalue().to_pybytes())

    def look_file(self, unit: Unit) -> Path:
        """Where the looks of a unit are kept."""
        return self.work / "looks" / f"{unit.number:06d}.parquet"

    def records(self, unit: Unit) -> list[Record]:
        """What `look` left."""
        table = pq.read_table(self.look_file(unit), use_threads=False)
        columns = [column.to_pylist() for column in table.columns]
        positions = range(unit.position, unit.position + unit.stop - unit.start)
        return list(zip(positions, *columns, strict=True))

    def reasons(self, unit: Unit) -> list[str]:
        """The reasons alone, "" for what is not dropped yet."""
        table = pq.read_table(self.look_file(unit), columns=["reason"], use_threads=False)
        return table.column("reason").to_pylist()

    # Choosing.

    def near_duplicates(self, group: Iterable[tuple[str, int, int, bytes]]) -> list[Drop]:
        """Of (id, position, hash, colour)s: those that are near an earlier one, by id."""
        rules, ordered = self.rules, sorted(group)
        hashes = np.array([entry[2] for entry in ordered], np.uint64)
        colours = np.frombuffer(b"".join(entry[3] for entry in ordered), np.uint8)
        first = first_neighbours(
            hashes, colours.reshape(-1, COLOUR_VALUES), rules.near_distance or 0, rules.near_colour
        )
        return [
            (ordered[i][1], Dropped.NEAR_DUPLICATE.value, ordered[first[i]][0])
            for i in np.flatnonzero(first >= 0)
        ]

    # Writing.

    def shard_file(self, shard: int, shards: int) -> Path:
        """The ArrayRecord file of a shard, as TFDS names it."""
        return self.path / f"{self.name}-{self.split}.array_record-{shard:05d}-of-{shards:05d}"

    def report_file(self, shard: int) -> Path:
        """Where the counts of a shard are kept."""
        return self.work / "shards" / f"{shard:05d}.json"

    def is_written(self, shard: int, shards: int) -> bool:
        """Whether a shard is whole."""
        return is_whole(self.shard_file(shard, shards), self.report_file(shard))

    def write_shard(
        self, shard: int, shards: int, starts: list[int], records: Iterable[Record],
        drops: Iterable[Drop],
    ) -> None:  # fmt: skip
        """Gives every example of a shard its bucket and writes those that are kept.

        Args:
            shard: Its number.
            shards: Of how many.
            starts: Position of the first example of each part.
            records: All that belong to this shard, in any order.
            drops: Duplicates among them, in any order and number.

        Raises:
            PrepareError: The source is no longer what it was when it was looked at.
        """
        if self.is_written(shard, shards):
            return
        records = list(records)
        kept, dropped = choose(records, drops)
        counts: dict[str, int] = {}
        for line in dropped:
            counts[line["reason"]] = counts.get(line["reason"], 0) + 1
        account(len(records), len(kept), counts)
        text = "".join(json.dumps(line, sort_keys=True) + "\n" for line in dropped)
        listing = self.dropped_folder / f"{shard:05d}-of-{shards:05d}.jsonl"
        write_into(listing, text.encode())
        picked = _Picked(self.parts, starts, kept, self.limits)
        file = self.shard_file(shard, shards)
        writer = ShardWriter(picked, self.limits, drop_bad=False, num_threads=self.threads)
        length, refused = writer.write(file, range(len(picked)))
        if refused:
            raise PrepareError(f"{dict(refused)}: readable before, and no longer")
        report = {
            "kept": length, "dropped": counts, "bytes": file.stat().st_size,
            "kept_without_watermark_score": sum(record[3] for record in kept),
        }  # fmt: skip
        write_into(self.report_file(shard), json.dumps(report, sort_keys=True).encode())


def choose(
    records: Iterable[Record], drops: Iterable[Drop]
) -> tuple[list[Record], list[dict[str, str]]]:
    """Resolves the examples of a shard to one bucket each.

    Equal ids meet here, because the id decides the shard. An example with several kinds of
    duplicates is counted under the first of: same id, same bytes, near.

    Returns:
        What is kept, ordered by id; what is dropped, in that order, with the reason.
    """
    order = (Dropped.DUPLICATE_BYTES, Dropped.NEAR_DUPLICATE)
    best: dict[int, Drop] = {}
    for drop in drops:
        if drop[0] not in best or _rank(order, drop) < _rank(order, best[drop[0]]):
            best[drop[0]] = drop
    kept, dropped, seen = [], [], set()
    for record in sorted(records, key=lambda record: (record[1], record[0])):
        position, example_id, reason = record[:3]
        line = {"id": example_id, "reason": reason}
        if not reason and example_id in seen:
            line["reason"] = Dropped.DUPLICATE_ID.value
        elif not reason and position in best:
            line |= {"reason": best[position][1], "kept": best[position][2]}
        if line["reason"]:
            dropped.append(line)
        else:
            kept.append(record)
        if not reason:
            seen.add(example_id)
    return kept, dropped


def _rank(order: tuple[str, ...], drop: Drop) -> tuple[int, str]:
    return order.index(drop[1]), drop[2]


class _Picked:
    """The kept examples of a shard as a source, read again and checked against the first look."""

    def __init__(
        self, parts: tuple[SourceSpec, ...], starts: list[int], kept: list[Record],
        limits: ImageLimits,
    ):  # fmt: skip
        self._parts, self._starts, self._kept, self._limits = parts, starts, kept, limits

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Example:
        position, example_id, _, _, sha256, phash, _, width, height = self._kept[index]
        part = bisect.bisect_right(self._starts, position) - 1
        example = open_part(self._parts[part])[position - self._starts[part]]
        data = example.encoded_image(self._limits)
        if example.id != example_id or hashlib.sha256(data).digest() != sha256:
            raise PrepareError(
                f"{example_id}: the source has changed since it was looked at; remove the output "
                "and prepare it again"
            )
        facts = {
            "sha256": sha256.hex(), "phash": f"{phash:016x}", "width": width, "height": height,
        }  # fmt: skip
        extras = {**example.extras, "prepared": facts}
        return Example(example_id, data, example.caption or None, extras)


def source_parts(spec: SourceSpec) -> tuple[SourceSpec, ...]:
    """A folder of tars or parquet files as one source a file; anything else as it is.

    Ids stay what they are in the whole. A worker then opens the files that it works on alone, and
    one that is broken can be named, or left out.

    Raises:
        SourceError: Nothing is there.
    """
    kind = infer_kind(spec) if spec.kind == "auto" else spec.kind
    spec = dataclasses.replace(spec, kind=kind)
    suffix = {"webdataset": ".tar", "parquet": ".parquet"}.get(kind)
    if suffix is None or spec.path is None or not Path(spec.path).is_dir():
        return (spec,)
    files = list_files(Path(spec.path), suffix)
    return tuple(dataclasses.replace(spec, path=str(file)) for file in files)


def units_of(lengths: Iterable[int], size: int) -> tuple[list[Unit], list[int]]:
    """Cuts parts of these lengths into units.

    Returns:
        The units, and the position of each part's first example.
    """
    lengths = list(lengths)
    starts = [0, *itertools.accumulate(lengths)][:-1]
    cuts = [
        (part, start, min(start + size, length))
        for part, length in enumerate(lengths)
        for start in range(0, length, size)
    ]
    units = [
        Unit(number, part, start, stop, starts[part] + start)
        for number, (part, start, stop) in enumerate(cuts)
    ]
    return units, starts


@functools.lru_cache(maxsize=64)
def open_part(spec: SourceSpec) -> Source:
    """Opens a part; a worker keeps the last ones open."""
    return open_source(spec)


def save_exclusion(work: Path, exclusion: Exclusion) -> None:
    """Puts the exclusion where workers find it."""
    ids = np.array([x.encode() for x in sorted(exclusion.ids)], dtype=object)
    columns: Mapping[str, Any] = {
        "ids": pa.array(ids.tolist(), pa.binary()),
        "sha256": pa.array(sorted(exclusion.sha256), pa.binary()),
        "hashes": pa.array(exclusion.hashes),
        "colours": pa.array([row.tobytes() for row in exclusion.colours], pa.binary()),
    }
    for name, column in columns.items():
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({name: column}), sink)
        write_into(work / f"exclude-{name}.parquet", sink.getvalue().to_pybytes())


@functools.lru_cache(maxsize=2)
def load_exclusion(work: Path) -> Exclusion:
    """What `save_exclusion` left."""

    def column(name: str) -> list[Any]:
        return pq.read_table(work / f"exclude-{name}.parquet").column(name).to_pylist()

    colours = np.frombuffer(b"".join(column("colours")), np.uint8).reshape(-1, COLOUR_VALUES)
    return Exclusion(
        frozenset(x.decode() for x in column("ids")), frozenset(column("sha256")),
        np.array(column("hashes"), np.uint64), colours,
    )  # fmt: skip


def write_into(file: Path, data: bytes) -> None:
    """`write_whole`, and the folder it goes to."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, data)
