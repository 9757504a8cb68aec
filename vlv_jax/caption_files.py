"""What `vlv_jax.caption` reads and writes: inputs of any kind, and an output that resumes."""

import collections
import contextlib
import dataclasses
import glob
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from core_jax.data.sources import (
    IMAGE_SUFFIXES,
    Example,
    Source,
    SourceError,
    clean_text,
    read_json,
    read_jsonl,
    unclean_name,
)
from core_jax.data.webdataset import WebdatasetSource
from core_jax.files import write_whole

_PATH_KEYS = ("file_name", "image", "file", "path")


@dataclasses.dataclass(frozen=True)
class Item:
    """One image to caption.

    Attributes:
      id: unique among the inputs and the same in every run of the same command.
      place: where it comes from, as the output says it: `file_name`, and `member` in an archive.
      path: the image's own file; None inside archives, which have no place for a text beside it.
      source: holds the image.
      index: in that source.
    """

    id: str
    place: Mapping[str, str]
    path: pathlib.Path | None
    source: Source = dataclasses.field(repr=False)
    index: int

    def example(self) -> Example:
        """The record, its image not yet decoded."""
        return self.source[self.index]


@dataclasses.dataclass(frozen=True)
class FileList:
    """Image files anywhere on the disk.

    A missing file is found out when it is read, like any other unusable image. Links are followed:
    whoever starts the command may read what it names, and hub caches are nothing but links.
    """

    paths: list[pathlib.Path]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Example:
        return Example(str(self.paths[index]), self.paths[index])


def read_manifest(path: pathlib.Path) -> tuple[list[str], list[pathlib.Path]]:
    """Ids and files that a manifest lists.

    Args:
      path: .jsonl with an object a line (`file_name`, `image`, `file` or `path`, optionally
        `id`), .json with a list of such objects or of paths, or any other suffix: a path a line.
        Relative paths start at the manifest's folder.

    Raises:
      SourceError: not such a file, or it lists nothing.
    """
    ids, files = [], []
    for where, entry in _entries(path):
        record = entry if isinstance(entry, dict) else {"path": entry}
        name = next((record[key] for key in _PATH_KEYS if key in record), None)
        if not isinstance(name, str) or not name or "\0" in name:
            raise SourceError(f"{where}: an entry is a path, or an object with one of {_PATH_KEYS}")
        file = pathlib.Path(os.path.normpath(path.parent / name))
        raw = pathlib.Path(unclean_name(str(file)))
        files.append(raw if raw != file and not file.exists() else file)
        ids.append(str(record.get("id", name)))
    if not files:
        raise SourceError(f"{path}: the manifest lists no image")
    return ids, files


def _entries(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        yield from ((f"{path}:{number}", record) for number, record in read_jsonl(path))
    elif suffix == ".json":
        content = read_json(path)
        if not isinstance(content, list):
            raise SourceError(f"{path}: a manifest is a list, not {type(content).__name__}")
        yield from ((f"{path}[{i}]", entry) for i, entry in enumerate(content))
    else:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise SourceError(
                f"{path}: neither an image ({', '.join(IMAGE_SUFFIXES)}), a .tar, nor a text "
                "file with a path a line"
            ) from None
        yield from ((f"{path}:{n}", line) for n, line in enumerate(lines, 1) if line.strip())


def list_items(inputs: Sequence[str]) -> list[Item]:
    r"""Every image of the inputs, in their order; the same file twice is taken once.

    Ids are paths as they were given (`photos/a/1.jpg`, `data/000.tar/000123`), or the manifest's
    own; where two different images have one id, the second gets "#2". Bytes of names that are no
    UTF-8 become escapes (`caf\udce9.jpg`), which a manifest may have, too.

    Raises:
      SourceError: an input that does not exist, cannot be read, or holds no image.
    """
    items: list[Item] = []
    seen: set[tuple[str, ...]] = set()
    times: collections.Counter[str] = collections.Counter()
    for given in inputs:
        found = 0
        for item in _items_of(pathlib.Path(given)):
            found += 1
            place = (os.path.abspath(item.place["file_name"]), item.place.get("member", ""))
            if place in seen:
                continue
            seen.add(place)
            name = clean_text(item.id)
            times[name] += 1
            number = times[name]
            items.append(
                dataclasses.replace(
                    item,
                    id=name if number == 1 else f"{name}#{number}",
                    place={key: clean_text(value) for key, value in item.place.items()},
                )
            )
        if not found:
            raise SourceError(f"{given}: no image ({', '.join(IMAGE_SUFFIXES)}) and no .tar")
    return items


def _items_of(path: pathlib.Path) -> Iterator[Item]:
    if not path.exists():
        raise SourceError(f"{path}: no such file or folder")
    if path.is_dir():
        images, tars = _scan(path)
        yield from _of_files([image.as_posix() for image in images], images)
        for tar in tars:
            yield from _of_tar(tar)
    elif path.suffix.lower() == ".tar":
        yield from _of_tar(path)
    elif path.suffix.lower() in IMAGE_SUFFIXES:
        yield from _of_files([path.as_posix()], [path])
    else:
        yield from _of_files(*read_manifest(path))


def _of_files(ids: list[str], files: list[pathlib.Path]) -> Iterator[Item]:
    source = FileList(files)
    for index, (item_id, file) in enumerate(zip(ids, files, strict=True)):
        yield Item(item_id, {"file_name": file.as_posix()}, file, source, index)


def _scan(root: pathlib.Path) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """Image files and tars under a folder, each sorted; hidden files are left out."""
    found = [
        pathlib.Path(folder) / file
        for folder, _, files in os.walk(root)
        for file in files
        if not file.startswith(".")
    ]
    images = sorted(file for file in found if file.suffix.lower() in IMAGE_SUFFIXES)
    return images, sorted(file for file in found if file.suffix.lower() == ".tar")


def _of_tar(path: pathlib.Path) -> Iterator[Item]:
    source = WebdatasetSource(path)
    for index in range(len(source)):
        member = source.key(index)
        place = {"file_name": path.as_posix(), "member": member}
        yield Item(f"{path.as_posix()}/{member}", place, None, source, index)


def sidecar_paths(items: Iterable[Item]) -> dict[str, pathlib.Path]:
    """The `.txt` beside each image that is a file of its own, by id.

    `a.jpg` and `a.png` in one folder get `a.jpg.txt` and `a.png.txt`.
    """
    own = [item for item in items if item.path is not None]
    times = collections.Counter(os.path.splitext(os.path.abspath(item.path))[0] for item in own)
    return {
        item.id: item.path.with_suffix(".txt")
        if times[os.path.splitext(os.path.abspath(item.path))[0]] == 1
        else item.path.with_name(item.path.name + ".txt")
        for item in own
    }


def write_sidecar(path: pathlib.Path, caption: str) -> None:
    """Writes one text whole or not at all."""
    write_whole(path, caption + "\n", sync=False)


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
        wrong = [
            f"{name} was {old.get(name)!r:.20}, is {value!r:.20}"
            for name, value in settings.items()
            if old is not None and old.get(name) != value
        ]
        if wrong:
            raise SourceError(
                f"{file} was begun with other settings: {'; '.join(wrong)}. Go on with those, "
                "name another --output, or make all captions anew by --overwrite=replace"
            )


def note_settings(file: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Notes what a file's captions are made with in `<file>.settings.json`."""
    write_whole(_settings_path(file), json.dumps(dict(settings), indent=1) + "\n")


def _settings_path(file: pathlib.Path) -> pathlib.Path:
    return file.with_name(f"{file.name}.settings.json")


def _noted_settings(file: pathlib.Path) -> dict[str, Any] | None:
    """What `note_settings` noted beside a file; None where there is no note."""
    note = _settings_path(file)
    try:
        return json.loads(note.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise SourceError(f"{note} is damaged; name another --output") from None


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
    note_settings(partial, settings)
    os.replace(partial, files[index])
    _move(_settings_path(partial), _settings_path(files[index]))
    if any(
        _noted_settings(file) != settings or partial_path(file, fingerprint).exists()
        for file in files
    ):
        return
    for file in set(_all_files(output)) - set(files):
        file.unlink(missing_ok=True)
        _settings_path(file).unlink(missing_ok=True)


def recover_replacements(output: pathlib.Path) -> None:
    """Moves settings whose captions were moved when the process was killed."""
    for note in output.parent.glob(f"{glob.escape(output.stem)}*.partial.settings.json"):
        partial = note.with_name(note.name.removesuffix(".settings.json"))
        if not partial.exists():
            file = note.with_name(partial.name.rsplit(".", 2)[0])
            _move(note, _settings_path(file))


def _move(source: pathlib.Path, target: pathlib.Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # another process recovered it
        os.replace(source, target)


def shard_path(output: pathlib.Path, index: int, count: int) -> pathlib.Path:
    """Where one of `count` processes writes: the output itself, or a numbered file beside it."""
    if count == 1:
        return output
    return output.with_name(f"{output.stem}-{index:05d}-of-{count:05d}{output.suffix}")


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
    """Records of the output and of every numbered file beside it, of any number of processes."""
    records: dict[str, dict[str, Any]] = {}
    for file in _all_files(output):
        records |= read_records(file)
    return records
