import errno
import os

import pytest

from core_jax.files import move_whole, remove_unfinished, storage_problem, write_whole


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("sync", [True, False])
def test_a_file_is_whole_or_as_it_was(tmp_path, sync):
    file = tmp_path / "a.json"
    write_whole(file, "é\n", sync=sync)
    assert file.read_bytes() == "é\n".encode()

    def dying():
        yield b"half"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space"):
        write_whole(file, dying(), sync=sync)
    assert file.read_bytes() == "é\n".encode()
    assert names(tmp_path) == ["a.json"]
    write_whole(file, [b"x", b"y"], sync=sync)
    assert file.read_bytes() == b"xy"


def test_what_is_moved_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    (tmp_path / "new").write_text("new")
    (tmp_path / "old").write_text("old")
    done, replace, fsync = [], os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: done.append("fsync") or fsync(file))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append("replace") or replace(a, b))
    move_whole(tmp_path / "new", tmp_path / "old")
    assert done == ["fsync", "replace", "fsync"]
    assert (tmp_path / "old").read_text() == "new"
    with pytest.raises(FileNotFoundError):
        move_whole(tmp_path / "new", tmp_path / "old")


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    for name in (".a.json.0123456789ab.tmp", ".b.json.0123456789ab.tmp", "a.json", "a.json.tmp"):
        (tmp_path / name).touch()
    remove_unfinished(tmp_path / "a.json")
    assert names(tmp_path) == [".b.json.0123456789ab.tmp", "a.json", "a.json.tmp"]


def test_two_writers_with_one_process_number_do_not_meet(tmp_path, monkeypatch):
    """Containers on several machines count their processes alike."""
    monkeypatch.setattr(os, "getpid", lambda: 7)

    def other():
        write_whole(tmp_path / "a", "other")  # while the first is at it
        yield b"first"

    write_whole(tmp_path / "a", other())
    assert (tmp_path / "a").read_bytes() == b"first"
    assert names(tmp_path) == ["a"]


def test_a_disk_s_fault_is_said_whoever_wraps_it():
    full = OSError(errno.ENOSPC, "No space left on device", "runs/a")
    assert storage_problem(full).startswith("runs/a: the disk is full")
    wrapped = ValueError("orbax")
    wrapped.__cause__ = RuntimeError('write() failed: No space left on device; writing "x/y"')
    assert "the disk is full" in storage_problem(wrapped)
    assert "read-only" in storage_problem(OSError(errno.EROFS, "Read-only file system"))
    cpp = ValueError('OUT_OF_RANGE: Failed writing: "runs/a/d/0": File too large')
    assert storage_problem(cpp).startswith("runs/a/d/0: a file becomes longer")
    assert storage_problem(ValueError("shape")) == ""
    assert storage_problem(KeyError("a")) == ""
