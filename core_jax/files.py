"""Files that are there whole or not at all, whatever happens to the process or the machine."""

import contextlib
import errno
import os
import pathlib
import uuid
from collections.abc import Iterable

# What a person mends at the disk, not in the config.
_REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.EFBIG: "a file becomes longer than a process may make it here (ulimit -f) or than the "
    "file system takes: raise the limit, or name another folder",
    errno.EROFS: "the file system is read-only: mount it for writing, or name another folder",
    errno.EACCES: "permission denied: change its owner or its rights, or name another folder",
    errno.EPERM: "permission denied: change its owner or its rights, or name another folder",
    errno.EIO: "the disk fails (input/output error): look at the system's log",
}


def write_whole(
    path: str | os.PathLike[str], data: str | bytes | Iterable[bytes], *, sync: bool = True
) -> None:
    """Writes a file whole or, if the process or the machine dies, not at all.

    Several processes, also on machines that share the folder and count their processes alike, may
    write the same file at once: one of them wins.

    Args:
      path: the file; its folder must exist.
      data: text (as UTF-8), bytes, or pieces of bytes.
      sync: waits for the disk, so that a power cut is survived, too; for very many small files
        that is slow.
    """
    path = pathlib.Path(path)
    pieces = [data.encode()] if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with temporary.open("wb") as out:
            out.writelines([pieces] if isinstance(pieces, bytes) else pieces)
            out.flush()
            if sync:
                os.fsync(out.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # a full or read-only disk is what the caller hears of
            temporary.unlink(missing_ok=True)
    if sync:
        sync_folder(path.parent)


def move_whole(source: pathlib.Path, target: pathlib.Path) -> None:
    """Puts a file that was written piece by piece in the place of another one.

    Its content is on the disk before it has the name, and the name before this returns, so that
    after a power cut either file is there, whole.

    Raises:
      FileNotFoundError: there is no `source`.
    """
    sync_file(source)
    os.replace(source, target)
    sync_folder(target.parent)


def sync_file(path: str | os.PathLike[str]) -> None:
    """Puts a file on the disk, before something else says that it is whole."""
    with pathlib.Path(path).open("rb") as opened:
        os.fsync(opened.fileno())


def sync_folder(folder: pathlib.Path) -> None:
    """Makes renames in a folder survive a power cut, where the file system can do that."""
    with contextlib.suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def remove_unfinished(path: pathlib.Path) -> None:
    """Removes what killed processes left of writing `path`; call it where nobody else writes it."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        with contextlib.suppress(OSError):
            left.unlink(missing_ok=True)


def storage_problem(error: BaseException) -> str:
    """What is wrong with the disk, and the remedy, if that is what an error comes from; else "".

    Libraries wrap the operating system's error, or say it in words only, so that the whole chain
    of causes is looked at.
    """
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        number = current.errno if isinstance(current, OSError) else _told(str(current))
        if number in _REMEDIES:
            where = getattr(current, "filename", None)
            return f"{where or _place(str(current))}: {_REMEDIES[number]}".removeprefix(": ")
        current = current.__cause__ or current.__context__
    return ""


def _told(text: str) -> int | None:
    """The number of an error that is there in words, as TensorStore has it."""
    return next((number for number in _REMEDIES if os.strerror(number) in text), None)


def _place(text: str) -> str:
    """The first thing in quotes that looks like a path."""
    return next((part for part in text.split('"')[1::2] if "/" in part), "")
