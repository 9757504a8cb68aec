"""What `vlv_jax.caption` writes: an output that resumes, and is replaced whole or not at all."""

import contextlib
import glob
import json
import os
import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Any

from core_jax.data.sources import SourceError
from core_jax.files import move_whole, write_whole
from core_jax.resumed_output import (
    changed_settings,
    read_settings,
    settings_file,
    shard_path,
    write_settings,
)


def read_records(path: pathlib.Path, *, repair: bool = False) -> dict[str, dict[str, Any]]:
    """The records of an output by id; {} where there is none.

    The last line may be torn by a kill; it does not count, and with `repair` it is cut off.

    Raises:
      SourceError: another line is not a record: the file is no output of this command.
    """
    if not path.is_file():
        return {}
    records, good = {}, 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                if not line.endswith(b"\n"):
                    break
                record = json.loads(line)
                records[record["id"]] = record
            except (ValueError, KeyError, TypeError):
                raise SourceError(
                    f"{path}:{number}: not a record of vlv_jax.caption; name another --output"
                ) from None
            good += len(line)
    if repair and good < path.stat().st_size:
        os.truncate(path, good)
    return records


def drop_old_errors(path: pathlib.Path, mended: Collection[str]) -> None:
    """Repairs an output, and takes out the errors that no longer hold.

    Args:
      path: of the output.
      mended: ids of tars that can be read now. An error whose image has a later record goes, too.
    """
    records = read_records(path, repair=True)
    kept = {n: r for n, r in records.items() if not ("error" in r and n in mended)}
    if not records:
        return
    with path.open("rb") as lines:
        changed = sum(1 for _ in lines) != len(kept)
    if changed:
        write_whole(path, (as_line(record).encode() for record in kept.values()))


def as_line(record: Mapping[str, Any]) -> str:
    """A record as its line of the output."""
    return json.dumps(record, ensure_ascii=False) + "\n"


def check_settings(output: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Compares what captions are made with to the notes beside the captions that are there.

    Args:
      output: of the job.
      settings: as JSON.

    Raises:
      SourceError: some were made with other settings; all that differ are named.
    """
    for file in _all_files(output):
        old = _noted_settings(file)
        if old is not None and (changed := changed_settings(old, settings)):
            raise SourceError(
                f"{file} was begun with other settings: {changed}. Go on with those, name another "
                "--output, or make all captions anew by --overwrite=replace"
            )


def _noted_settings(file: pathlib.Path) -> dict[str, Any] | None:
    """What is noted beside a file of captions; None where there is no note.

    Raises:
      SourceError: the note is damaged.
    """
    try:
        return read_settings(file)
    except ValueError:
        raise SourceError(f"{settings_file(file)} is damaged; name another --output") from None


def partial_path(file: pathlib.Path, fingerprint: str) -> pathlib.Path:
    """Where a replacement of `file` grows until it is whole."""
    return file.with_name(f"{file.name}.{fingerprint}.partial")


def finish_replacement(
    output: pathlib.Path, fingerprint: str, index: int, count: int, settings: Mapping[str, Any]
) -> None:
    """Puts the whole new captions of one process, then their settings, in the old ones' place.

    Whatever the moment of a kill, the settings beside captions are those that made them: they are
    moved last, and `recover_replacements` makes up for a move that did not happen. The process
    that ends last removes what other numbers of processes had written.
    """
    files = [shard_path(output, i, count) for i in range(count)]
    partial = partial_path(files[index], fingerprint)
    write_settings(partial, settings)
    move_whole(partial, files[index])
    _move(settings_file(partial), settings_file(files[index]))
    if any(
        _noted_settings(file) != settings or partial_path(file, fingerprint).exists()
        for file in files
    ):
        return
    for file in set(_all_files(output)) - set(files):
        file.unlink(missing_ok=True)
        settings_file(file).unlink(missing_ok=True)


def recover_replacements(output: pathlib.Path) -> None:
    """Moves settings whose captions were moved when the process was killed."""
    for note in output.parent.glob(f"{glob.escape(output.stem)}*.partial.settings.json"):
        partial = note.with_name(note.name.removesuffix(".settings.json"))
        if not partial.exists():
            file = note.with_name(partial.name.rsplit(".", 2)[0])
            _move(note, settings_file(file))


def _move(source: pathlib.Path, target: pathlib.Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # another process recovered it
        os.replace(source, target)


def _all_files(output: pathlib.Path) -> list[pathlib.Path]:
    """Every numbered file beside the output, of any number of processes, then the output.

    A file counts that has a note of its settings and no captions yet, too.
    """
    stem, suffix = re.escape(output.stem), re.escape(output.suffix)
    form = re.compile(rf"{stem}-\d{{5}}-of-\d{{5,}}{suffix}")
    names = {
        file.name.removesuffix(".settings.json")
        for file in output.parent.glob(f"{glob.escape(output.stem)}-*-of-*")
    }
    return [*(output.with_name(n) for n in sorted(names) if form.fullmatch(n)), output]


def all_records(output: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Records of the output and of every numbered file beside it, of any number of processes.

    A caption counts more than an error that another file has of the same image.
    """
    records: dict[str, dict[str, Any]] = {}
    for file in _all_files(output):
        for name, record in read_records(file).items():
            if "error" not in record or name not in records:
                records[name] = record
    return records
