"""What a preparation is asked to do, and whether an output folder holds just that."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from core_jax.data.convert import existing_splits
from core_jax.data.images import BadImage, ImageLimits, decode_image
from core_jax.data.prepare_job import Job, PrepareError, open_part
from core_jax.data.prepare_rules import COLOUR_VALUES, Exclusion, Rules, fingerprint
from core_jax.data.sources import SourceSpec, open_source

_ALGORITHM = 1  # raise it where the same command would no longer write the same bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is prepared, and into what; with the source's files this decides every byte.

    Attributes:
        rules: What is kept.
        exclude_ids: File with an id a line, which must not be in the data.
        exclude_sha256: File with a hexadecimal sha256 of an encoded image a line, likewise.
        exclude_images: Source (any kind) whose images, and near duplicates of them, must not be.
        examples_per_shard: Examples a file, on average.
        examples_per_unit: Examples that a worker looks at before it saves what it found.
        skip_unreadable: Leave out tars and parquet files that cannot be read, and list them.
    """

    rules: Rules = dataclasses.field(default_factory=Rules)
    exclude_ids: str | None = None
    exclude_sha256: str | None = None
    exclude_images: str | None = None
    examples_per_shard: int = 2048
    examples_per_unit: int = 2048
    skip_unreadable: bool = False

    def __post_init__(self):
        if self.examples_per_shard < 1 or self.examples_per_unit < 1:
            raise ValueError("examples_per_shard and examples_per_unit are at least 1")


def stamp_of(parts: tuple[SourceSpec, ...], options: Options) -> dict[str, Any]:
    """What the output is a function of, JSON-like; the folder's stamp."""
    facts = []
    for part in parts:
        file = Path(part.path) if part.path else None
        is_file = file is not None and file.is_file()
        if is_file and file:
            facts.append([file.name, file.stat().st_size])
        else:
            opened = open_part(part)
            ends = [opened[i].id for i in (0, len(opened) - 1)] if len(opened) else []
            facts.append([len(opened), *ends])
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    source = {k: v for k, v in dataclasses.asdict(parts[0]).items() if v and k != "cache_dir"}
    if len(parts) > 1:
        source["path"] = str(Path(str(parts[0].path)).parent)
    given = dataclasses.asdict(options)
    for key in ("exclude_ids", "exclude_sha256"):
        if given[key]:
            given[key] = "sha256:" + hashlib.sha256(_read(given[key])).hexdigest()
    if given["exclude_images"]:
        given["exclude_images"] = os.path.abspath(given["exclude_images"])
    stamp = {"algorithm": _ALGORITHM, "source": source, "files": digest, **given}
    return json.loads(json.dumps(stamp))


def _read(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise PrepareError(f"{file}: cannot be read ({error.strerror})") from None


def finished_summary(job: Job, what: dict[str, Any]) -> dict[str, Any] | None:
    """The summary of a finished run of the same; None where there is something to do.

    Raises:
        PrepareError: It is another's, or its shards are no longer what was written.
    """
    file = job.path / f"prepare-{job.split}.json"
    if file.exists():
        summary = json.loads(file.read_text())
        _compare(file, summary["what"], what, "was prepared with other options or other files")
        _check_size(job, summary)
        shutil.rmtree(job.work, ignore_errors=True)  # killed just before it was done
        return summary
    stamp = job.work / "what.json"
    if stamp.exists():
        _compare(job.work, json.loads(stamp.read_text()), what, "is a part of another preparation")
    elif job.split in {info.name for info in existing_splits(job.path)}:
        raise PrepareError(
            f"{job.path} has a split {job.split!r} already; choose another name, version or split"
        )
    return None


def _check_size(job: Job, summary: dict[str, Any]) -> None:
    shards = summary["shards"]
    files = [job.shard_file(shard, shards) for shard in range(shards)]
    missing = [file.name for file in files if not file.is_file()]
    found = sum(file.stat().st_size for file in files if file.is_file())
    if missing or found != summary["bytes"]:
        raise PrepareError(
            f"{job.path}: the shards of {job.split!r} have {found} bytes, and {summary['bytes']} "
            f"were written{f'; missing: {missing[:5]}' if missing else ''}. They were damaged "
            "since: remove the folder, and prepare it again"
        )


def _compare(where: Path, then: dict[str, Any], now: dict[str, Any], problem: str) -> None:
    differing = sorted(key for key in {*then, *now} if then.get(key) != now.get(key))
    if differing:
        lines = [f"{key}: then {then.get(key)!r}, now {now.get(key)!r}" for key in differing]
        raise PrepareError(
            f"{where} {problem}; choose another name, version or split, or remove it first:\n  "
            + "\n  ".join(lines)
        )


def read_exclusion(options: Options) -> Exclusion:
    """Reads the lists and hashes the images that `options` excludes.

    Raises:
        PrepareError: A file that is not there or not such a list; an image that cannot be decoded.
    """
    ids, digests = set(), set()
    for line in _lines(options.exclude_ids):
        ids.add(line)
    for line in _lines(options.exclude_sha256):
        if not re.fullmatch(r"[0-9a-fA-F]{64}", line):
            raise PrepareError(f"{options.exclude_sha256}: {line!r:.80} is not a sha256 in hex")
        digests.add(bytes.fromhex(line))
    found = []
    if options.exclude_images:
        source, limits = open_source(SourceSpec(path=options.exclude_images)), ImageLimits()
        for index in range(len(source)):
            example = source[index]
            try:
                data = example.encoded_image(limits)
                found.append(fingerprint(decode_image(data, limits)))
            except BadImage as error:
                raise PrepareError(
                    f"{options.exclude_images}: {example.id} is unusable ({error}), so its likes "
                    "cannot be excluded; mend or remove it"
                ) from None
            digests.add(hashlib.sha256(data).digest())
    colours = np.frombuffer(b"".join(colour for _, colour in found), np.uint8).reshape(
        -1, COLOUR_VALUES
    )
    hashes = np.array([phash for phash, _ in found], np.uint64)
    return Exclusion(frozenset(ids), frozenset(digests), hashes, colours)


def _lines(file: str | None) -> list[str]:
    if not file:
        return []
    try:
        lines = _read(file).decode("utf-8").splitlines()
    except UnicodeDecodeError:
        raise PrepareError(f"{file}: not a text in UTF-8") from None
    return [line.strip() for line in lines if line.strip()]
