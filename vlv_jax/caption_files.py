"""What `vlv_jax.caption` reads: inputs of any kind; and the texts beside them."""

import collections
import dataclasses
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from core_jax.data.sources import (
    IMAGE_SUFFIXES,
    EmptySourceError,
    Example,
    Source,
    SourceError,
    clean_text,
    read_json,
    read_jsonl,
    unclean_name,
    walk_files,
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
      error: why there is nothing to caption, where that is known beforehand: a tar that cannot be
        read is one item.
    """

    id: str
    place: Mapping[str, str]
    path: pathlib.Path | None
    source: Source = dataclasses.field(repr=False)
    index: int
    error: str = ""

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
            lines = path.read_text(encoding="utf-8-sig").splitlines()
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

    A tar that is broken or empty is one item with an error, so that it does not keep the others
    from being captioned.

    Raises:
      SourceError: an input that does not exist, cannot be read, or holds no image; nothing but
        tars that cannot be read (all are named).
    """
    items: list[Item] = []
    seen: set[tuple[str, ...]] = set()
    times: collections.Counter[str] = collections.Counter()
    for given in inputs:
        found = 0
        for item in _items_of(pathlib.Path(given).expanduser()):
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
    if all(item.error for item in items):
        named = "\n  ".join(f"{item.id}: {item.error}" for item in items)
        raise SourceError(f"no tar can be used; make or fetch them again:\n  {named}")
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
    found = sorted(walk_files(root))
    images = [file for file in found if file.suffix.lower() in IMAGE_SUFFIXES]
    return images, [file for file in found if file.suffix.lower() == ".tar"]


def _of_tar(path: pathlib.Path) -> Iterator[Item]:
    try:
        source = WebdatasetSource(path)
    except SourceError as error:
        reason = "empty_tar" if isinstance(error, EmptySourceError) else "unreadable_tar"
        yield Item(path.as_posix(), {"file_name": path.as_posix()}, None, FileList([]), 0, reason)
        return
    for index in range(len(source)):
        member = source.key(index)
        place = {"file_name": path.as_posix(), "member": member}
        yield Item(f"{path.as_posix()}/{member}", place, None, source, index)


def sidecar_paths(items: Iterable[Item]) -> dict[str, pathlib.Path]:
    """The `.txt` beside each image that is a file of its own, by id.

    It is `a.txt` beside `a.jpg`. Where another image in the folder has a claim to that name, as
    `a.png` and `a` would have, it is `a.jpg.txt`. So names differ, and follow from the folder and
    not from what of it is captioned. `FolderSource` reads them back.
    """
    own = [item for item in items if item.path is not None]
    names = collections.defaultdict(set)
    for item in own:
        names[item.path.parent].add(item.path.name)
    claims = {folder: _claims(folder, given) for folder, given in names.items()}
    return {
        item.id: item.path.with_name(f"{item.path.name}.txt")
        if claims[item.path.parent][item.path.stem.casefold()] > 1
        else item.path.with_suffix(".txt")
        for item in own
    }


def _claims(folder: pathlib.Path, given: set[str]) -> collections.Counter[str]:
    """How many images of a folder may have their text under a name; some disks know no case.

    Those that were given count as well, whether they are there or not.
    """
    there = set(os.listdir(folder)) if folder.is_dir() else set()
    found = {name for name in there if name.lower().endswith(IMAGE_SUFFIXES)}
    images = [pathlib.PurePath(name) for name in found | given]
    claims = collections.Counter(image.stem.casefold() for image in images)
    return claims + collections.Counter(image.name.casefold() for image in images)


def write_sidecar(path: pathlib.Path, caption: str) -> None:
    """Writes one text whole or not at all."""
    write_whole(path, caption + "\n", sync=False)
