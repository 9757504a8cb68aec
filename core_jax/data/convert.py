"""Any source to a TFDS dataset in ArrayRecord, images byte for byte as they were.

    python -m core_jax.data.convert --from ~/laion-tars --out ~/datasets --name laion

writes ~/datasets/laion/1.0.0, which `tfds.data_source("laion", data_dir=...)` and a source of kind
"tfds" read without TensorFlow. A shard is written under another name and renamed when whole, so
running the same command again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import io
import json
import os
import re
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from core_jax.data.arguments import add_source_arguments, spec_from_arguments
from core_jax.data.images import BadImage, ImageLimits, Reason, decode_image
from core_jax.data.sources import Source, open_source
from core_jax.data.tfds_source import EXTRAS_KEY
from core_jax.files import sync_file, sync_folder, write_whole

_CHUNK = 64  # examples read ahead


class ConvertError(ValueError):
    """The output cannot be written as asked; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class ConvertReport:
    """What was written: the version folder, examples, and the dropped ids with their reasons."""

    path: Path
    written: int
    dropped: dict[str, Reason]


def convert_source(
    source: Source,
    out: str | os.PathLike,
    *,
    name: str = "converted",
    split: str = "train",
    version: str = "1.0.0",
    examples_per_shard: int = 2048,
    drop_bad: bool = False,
    limits: ImageLimits | None = None,
    num_threads: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> ConvertReport:
    """Writes one split; a dataset that has other splits already gets this one added.

    Features: image (encoded bytes, untouched), caption ("" where there is none), id, and the
    extras as JSON. An example without bytes (no image, missing file, over `limits.max_bytes`) is
    dropped and listed.

    Args:
        source: What to convert.
        out: The data_dir; the dataset goes to out/name/version.
        name: Of the dataset, in snake_case.
        split: Of the dataset.
        version: Of the dataset.
        examples_per_shard: Examples a file.
        drop_bad: Decode every image and drop those that `limits` refuse, too.
        limits: What is accepted.
        num_threads: Threads that read (and decode).
        progress: Called with (examples done, all examples) after every shard.

    Raises:
        ConvertError: A bad name, a split that exists, or leftovers of another conversion.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or not re.fullmatch(r"\w+", split):
        raise ConvertError(f"name {name!r} and split {split!r} must be in snake_case")
    if not len(source):
        raise ConvertError("the source is empty")
    path = Path(out) / name / version
    previous = existing_splits(path)
    if split in {info.name for info in previous}:
        raise ConvertError(f"{path} has a split {split!r} already; choose another name or version")
    limits = limits or ImageLimits()
    shards = -(-len(source) // examples_per_shard)
    journal = _Journal(path, split, source, examples_per_shard, drop_bad, limits)
    writer = ShardWriter(source, limits, drop_bad, num_threads)
    for shard in range(shards):
        file = path / f"{name}-{split}.array_record-{shard:05d}-of-{shards:05d}"
        indices = range(len(source))[shard * examples_per_shard : (shard + 1) * examples_per_shard]
        if not journal.has(shard, file):
            journal.add(shard, file, *writer.write(file, indices))
        if progress:
            progress(indices.stop, len(source))
    lengths, num_bytes, dropped = journal.totals(shards)
    if not sum(lengths):
        raise ConvertError(f"not one example could be kept; the first: {list(dropped.items())[:5]}")
    write_metadata(path, name, split, lengths, num_bytes, previous, writer.features)
    (path / f"conversion-{split}.json").write_text(
        json.dumps({"written": sum(lengths), "dropped": dropped}, indent=1)
    )
    journal.remove()
    reasons = {key: Reason(reason) for key, reason in dropped.items()}
    return ConvertReport(path, sum(lengths), reasons)


def dataset_features() -> Any:
    """TFDS's features of the datasets that this module writes."""
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "caption": tfds.features.Text(),
            "id": tfds.features.Text(),
            EXTRAS_KEY: tfds.features.Text(),
        }
    )


class ShardWriter:
    """Writes examples of a source as ArrayRecord files that TFDS reads.

    Args:
        source: Where examples come from.
        limits: What is accepted.
        drop_bad: Decode every image and drop what `limits` refuse.
        num_threads: Threads that read (and decode).
    """

    def __init__(self, source: Source, limits: ImageLimits, drop_bad: bool, num_threads: int):
        from tensorflow_datasets.core import example_serializer

        self.features = dataset_features()
        info: Any = self.features.get_serialized_info()
        self._serializer = example_serializer.ExampleSerializer(info)
        self._source, self._limits, self._drop_bad = source, limits, drop_bad
        self._threads = max(1, num_threads)

    def write(self, file: Path, indices: range) -> tuple[int, dict[str, str]]:
        """Writes one shard; returns its length and what was dropped."""
        from array_record.python.array_record_module import ArrayRecordWriter

        temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")
        # One record a group: random access decompresses nothing else.
        writer = ArrayRecordWriter(os.fspath(temporary), "group_size:1")
        length, dropped = 0, {}
        try:
            with concurrent.futures.ThreadPoolExecutor(self._threads) as pool:
                for start in range(0, len(indices), _CHUNK):
                    for key, record in pool.map(self._record, indices[start : start + _CHUNK]):
                        if isinstance(record, Reason):
                            dropped[key] = str(record)
                        else:
                            writer.write(record)
                            length += 1
        except BaseException:
            with contextlib.suppress(RuntimeError):  # closing writes, too: on a full disk it fails
                writer.close()
            temporary.unlink(missing_ok=True)
            raise
        writer.close()
        sync_file(temporary)
        os.replace(temporary, file)
        sync_folder(file.parent)
        return length, dropped

    def _record(self, index: int) -> tuple[str, bytes | Reason]:
        example = self._source[index]
        try:
            data = example.encoded_image(self._limits)
            if self._drop_bad:
                decode_image(data, self._limits)
        except BadImage as error:
            return example.id, error.reason
        encoded = self.features.encode_example(
            {
                "image": io.BytesIO(data),
                "caption": example.caption or "",
                "id": example.id,
                EXTRAS_KEY: json.dumps(dict(example.extras), default=_jsonable),
            }
        )
        # Without it the order of the features is another one in every process.
        message: Any = self._serializer.get_tf_example(encoded)
        return example.id, message.SerializeToString(deterministic=True)


class _Journal:
    """Which shards are whole, so that a stopped conversion goes on."""

    def __init__(
        self, path: Path, split: str, source: Source, per_shard: int, drop_bad: bool, limits: Any
    ):
        self._folder = path / f".conversion-{split}"
        self._folder.mkdir(parents=True, exist_ok=True)
        what = {
            "examples": len(source),
            "first": source[0].id,
            "last": source[len(source) - 1].id,
            "per_shard": per_shard,
            "drop_bad": drop_bad,
            "limits": json.loads(json.dumps(dataclasses.asdict(limits))),
        }
        stamp = self._folder / "what.json"
        if not stamp.exists():
            stamp.write_text(json.dumps(what))
        elif json.loads(stamp.read_text()) != what:
            raise ConvertError(f"{path} holds a part of another conversion; remove it first")

    def _file(self, shard: int) -> Path:
        return self._folder / f"{shard:05d}.json"

    def has(self, shard: int, file: Path) -> bool:
        return is_whole(file, self._file(shard))

    def add(self, shard: int, file: Path, length: int, dropped: dict[str, str]) -> None:
        entry = {"length": length, "dropped": dropped, "bytes": file.stat().st_size}
        write_whole(self._file(shard), json.dumps(entry))

    def totals(self, shards: int) -> tuple[list[int], int, dict[str, str]]:
        """Lengths of the shards, bytes of the split so far (0: TFDS counts), dropped ids."""
        entries = [json.loads(self._file(shard).read_text()) for shard in range(shards)]
        dropped = {key: value for entry in entries for key, value in entry["dropped"].items()}
        split_files = self._folder.name.removeprefix(".conversion-")
        files = self._folder.parent.glob(f"*-{split_files}.array_record-*")
        return [e["length"] for e in entries], sum(f.stat().st_size for f in files), dropped

    def remove(self) -> None:
        for file in self._folder.iterdir():
            file.unlink()
        self._folder.rmdir()


def is_whole(file: Path, report: Path) -> bool:
    """Whether a shard is what was written, by the size in its report ("bytes").

    A report without one (of an earlier release) is believed.
    """
    if not (file.is_file() and report.is_file()):
        return False
    try:
        size = json.loads(report.read_text()).get("bytes")
    except (ValueError, AttributeError):
        return False
    return size is None or file.stat().st_size == size


def existing_splits(path: Path) -> list[Any]:
    """TFDS's split infos of a version folder; none where nothing is prepared."""
    if not (path / "dataset_info.json").is_file():
        return []
    import tensorflow_datasets as tfds

    return list(tfds.builder_from_directory(os.fspath(path)).info.splits.values())


def write_metadata(
    path: Path, name: str, split: str, lengths: list[int], num_bytes: int,
    previous: list[Any], features: Any,
    description: str = "Images with captions, written by core_jax.data.convert.",
) -> None:  # fmt: skip
    """Writes TFDS's metadata of a version folder whose shards are there.

    Args:
        path: The version folder.
        name: Of the dataset.
        split: The split that was just written.
        lengths: Of its shards, in examples.
        num_bytes: Of its shards together.
        previous: Split infos of the other splits.
        features: As `ShardWriter` has them.
        description: One line.
    """
    import tensorflow_datasets as tfds

    template = tfds.core.ShardedFileTemplate(
        dataset_name=name, data_dir=epath.Path(path), split=split, filetype_suffix="array_record"
    )
    info = tfds.core.SplitInfo(
        name=split, shard_lengths=lengths, num_bytes=num_bytes, filename_template=template
    )
    tfds.folder_dataset.write_metadata(
        data_dir=os.fspath(path),
        features=features,
        split_infos=[*previous, info],
        description=description,
        check_data=False,  # it asks TensorFlow for the files; the shards were just written
    )


def _jsonable(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    return str(value)


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m core_jax.data.convert", description=__doc__)
    add_source_arguments(parser, prefix="from-")
    parser.add_argument("--out", required=True, help="data_dir of the dataset")
    parser.add_argument("--name", default="converted", help="name of the dataset")
    parser.add_argument("--split", default="train", help="split to write")
    parser.add_argument("--version", default="1.0.0", help="version to write")
    parser.add_argument("--examples-per-shard", type=int, default=2048)
    parser.add_argument("--drop-bad", action="store_true", help="decode all, drop what is broken")
    parser.add_argument("--num-threads", type=int, default=8)
    arguments = parser.parse_args(argv)
    try:
        report = convert_source(
            open_source(spec_from_arguments(arguments)),
            arguments.out,
            name=arguments.name,
            split=arguments.split,
            version=arguments.version,
            examples_per_shard=arguments.examples_per_shard,
            drop_bad=arguments.drop_bad,
            num_threads=arguments.num_threads,
            progress=lambda done, total: print(f"{done} of {total} examples", file=sys.stderr),
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{report.path}: {report.written} examples, {len(report.dropped)} dropped")
    for example_id, reason in list(report.dropped.items())[:20]:
        print(f"  dropped {example_id}: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
