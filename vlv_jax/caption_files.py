"""What `vlv_jax.caption` reads and writes: inputs of any kind, and an output that resumes."""

import collections
import dataclasses
import glob
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from core_jax.data.images import BadImage, Reason
from core_jax.data.sources import (
    IMAGE_SUFFIXES,
    EmptySourceError,
    Example,
    Source,
    SourceError,
    read_json,
    read_jsonl,
    readable_name,
)
from core_jax.data.webdataset import WebdatasetSource
from core_jax.files import write_whole
from core_jax.resumed_output import (
    changed_settings,
    read_settings,
    settings_file,
    write_settings,
)

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
        files.append(pathlib.Path(os.path.normpath(path.parent / name)))
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
    """Every image of the inputs, in their order; the same file twice is taken once.

    Ids are paths as they were given (`photos/a/1.jpg`, `data/000.tar/000123`), or the manifest's
    own; where two different images have one id, the second gets "#2".

    Raises:
      SourceError: an input that does not exist, cannot be read, or holds no image.
    """
    items: list[Item] = []
    seen: set[tuple[str, ...]] = set()
    times: collections.Counter[str] = collections.Counter()
    for given in inputs:
        found = 0
        for item in _items_of(pathlib.Path(given).expanduser()):
            found += 1
            place = (str(item.path or item.place["file_name"]), item.place.get("member", ""))
            place = (os.path.abspath(place[0]), place[1])
            if place in seen:
                continue
            seen.add(place)
            times[item.id] += 1
            number = times[item.id]
            items.append(
                item if number == 1 else dataclasses.replace(item, id=f"{item.id}#{number}")
            )
        if not found:
            raise SourceError(f"{given}: no image ({', '.join(IMAGE_SUFFIXES)}) and no .tar")
    return items


def _items_of(path: pathlib.Path) -> Iterator[Item]:
    if not path.exists():
        raise SourceError(f"{path}: no such file or folder")
    if path.is_dir():
        images, tars = _scan(path)
        yield from _of_files([readable_name(image.as_posix()) for image in images], images)
        for tar in tars:
            yield from _of_tar(tar)
    elif path.suffix.lower() == ".tar":
        yield from _of_tar(path)
    elif path.suffix.lower() in IMAGE_SUFFIXES:
        yield from _of_files([readable_name(path.as_posix())], [path])
    else:
        yield from _of_files(*read_manifest(path))


def _of_files(ids: list[str], files: list[pathlib.Path]) -> Iterator[Item]:
    source = FileList(files)
    for index, (item_id, file) in enumerate(zip(ids, files, strict=True)):
        place = {"file_name": readable_name(file.as_posix())}
        yield Item(item_id, place, file, source, index)


def _scan(root: pathlib.Path) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """Image files and tars under a folder, each sorted; hidden files are left out."""
    found, visited = [], set()
    for folder, folders, files in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in visited:  # links may lead in a circle
            folders.clear()
            continue
        visited.add(real)
        folders.sort()
        found += [pathlib.Path(folder) / file for file in files if not file.startswith(".")]
    images = sorted(file for file in found if file.suffix.lower() in IMAGE_SUFFIXES)
    return images, sorted(file for file in found if file.suffix.lower() == ".tar")


@dataclasses.dataclass(frozen=True)
class _NoArchive:
    """Stands for a tar that cannot be read to its end, or holds no image."""

    reason: Reason

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Example:
        raise BadImage(self.reason)


def _of_tar(path: pathlib.Path) -> Iterator[Item]:
    """Its images; one item that cannot be used where there are none, for the others go on."""
    name = readable_name(path.as_posix())
    try:
        source = WebdatasetSource(path)
    except SourceError as error:
        empty = isinstance(error, EmptySourceError)
        source = _NoArchive(Reason.NO_IMAGE if empty else Reason.BROKEN)
        yield Item(name, {"file_name": name}, None, source, 0)
        return
    for index in range(len(source)):
        member = source.key(index)
        place = {"file_name": name, "member": member}
        yield Item(f"{name}/{member}", place, None, source, index)


def sidecar_paths(items: Iterable[Item]) -> dict[str, pathlib.Path]:
    """The `.txt` beside each image that is a file of its own, by id.

    `a.jpg` gets `a.txt`. Where that would be another image's, too, whole names are kept: `a.jpg`
    and `a.png` in one folder get `a.jpg.txt` and `a.png.txt`. `caption_suffix` reads both forms.
    """
    own = {item.id: item.path for item in items if item.path is not None}
    texts = {name: path.with_suffix(".txt") for name, path in own.items()}
    while True:
        times = collections.Counter(os.path.abspath(text) for text in texts.values())
        shared = [
            name for name, text in texts.items()
            if times[os.path.abspath(text)] > 1 and text != _whole_name(own[name])
        ]  # fmt: skip
        if not shared:
            return texts
        texts |= {name: _whole_name(own[name]) for name in shared}


def _whole_name(image: pathlib.Path) -> pathlib.Path:
    return image.with_name(image.name + ".txt")


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
    """Notes what captions are made with in `<output>.settings.json`, or compares with the note.

    Args:
      output: of the job.
      settings: as JSON.

    Raises:
      SourceError: the output was begun with other settings, all that differ are named; or it is
        being made anew.
    """
    try:
        old = read_settings(output)
    except ValueError:
        raise SourceError(f"{settings_file(output)} is damaged; name another --output") from None
    if old is None:
        write_settings(output, settings)
        return
    if old == _BEING_REPLACED:
        raise SourceError(
            f"{output} was being made anew and is not whole: go on with --overwrite=replace, "
            "or name another --output"
        )
    if changed := changed_settings(old, settings):
        raise SourceError(
            f"{output} was begun with other settings: {changed}. Go on with those, name another "
            "--output, or make all captions anew by --overwrite=replace"
        )


_BEING_REPLACED = {"being_replaced": True}


def begin_replacing(output: pathlib.Path) -> None:
    """Until it ends, nobody may take the old captions for the new ones' beginning."""
    write_settings(output, _BEING_REPLACED)


def end_replacing(
    output: pathlib.Path, settings: Mapping[str, Any], count: int, fingerprint: str
) -> None:
    """Notes the new settings and removes old parts, once no process has anything left to do.

    Args:
      output: of the job.
      settings: of all its captions.
      count: processes that wrote them; parts of another number of processes are old.
      fingerprint: of this replacement.
    """
    unfinished = list(output.parent.glob(f"{glob.escape(output.stem)}*.partial"))
    if any(file.name.endswith(f".{fingerprint}.partial") for file in unfinished):
        return  # another process's
    for file in unfinished:  # of replacements that were given up
        file.unlink(missing_ok=True)
    for file in _parts(output):
        if not file.stem.endswith(f"-of-{count:05d}") or count == 1:
            file.unlink(missing_ok=True)
    if count > 1:
        output.unlink(missing_ok=True)
    write_settings(output, settings)


def _parts(output: pathlib.Path) -> list[pathlib.Path]:
    pattern = f"{glob.escape(output.stem)}-{'[0-9]' * 5}-of-{'[0-9]' * 5}{output.suffix}"
    return sorted(output.parent.glob(pattern))


def all_records(output: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Records of the output and of every numbered file beside it, of any number of processes."""
    records: dict[str, dict[str, Any]] = {}
    for file in (*_parts(output), output):
        records |= read_records(file)
    return records
