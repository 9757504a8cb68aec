"""The check by itself; tests/launch/test_two_processes.py has it between real processes."""

import pathlib
import threading

import pytest

from core_jax import commands, shared_folder
from core_jax.preflight import PreflightError
from core_jax.shared_folder import check_shared


@pytest.fixture
def both(monkeypatch):
    """Runs the check as two processes, in threads, each with a folder of its own."""
    local = threading.local()
    told = {}
    barrier = threading.Barrier(2, timeout=60)
    monkeypatch.setattr(shared_folder.jax, "process_count", lambda: 2)
    monkeypatch.setattr(shared_folder.jax, "process_index", lambda: local.index)
    monkeypatch.setattr(shared_folder.jax.distributed, "is_initialized", lambda: True)

    def exchange(facts):
        told[local.index] = {**facts, "host": f"host-{local.index}"}
        barrier.wait()
        found = [told[0], told[1]]
        barrier.wait()
        return found

    monkeypatch.setattr(shared_folder, "exchange", exchange)

    def run(*folders, seconds=0.5):
        ended = {}

        def one(index):
            local.index = index
            try:
                check_shared(folders[index], seconds=seconds)
                ended[index] = ""
            except PreflightError as error:
                ended[index] = str(error)

        threads = [threading.Thread(target=one, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [ended[0], ended[1]]

    return run


def test_one_folder_is_shared_and_nothing_is_left_in_it(both, tmp_path):
    assert both(tmp_path / "run", tmp_path / "run") == ["", ""]
    assert not list((tmp_path / "run").iterdir())


def test_the_host_that_sees_another_folder_is_named_by_all(both, tmp_path):
    texts = both(tmp_path / "a", tmp_path / "b")
    assert texts[0].startswith(
        "process 1 (host-1) does not see within 0.5 s what process 0 (host-0"
    )
    assert "--workdir must be a folder that all processes share" in texts[1]


def test_a_mount_that_hangs_takes_no_longer(both, tmp_path, monkeypatch):
    slow = threading.Event()
    monkeypatch.setattr(shared_folder, "_look", lambda *_: slow.wait(60))
    assert all("process 1 (host-1)" in text for text in both(tmp_path, tmp_path))
    slow.set()


def test_a_folder_that_process_0_cannot_write_is_left_to_who_needs_it(both, tmp_path):
    (tmp_path / "file").touch()
    assert both(tmp_path / "file" / "run", tmp_path / "elsewhere") == ["", ""]


def test_alone_nothing_is_written(tmp_path):
    check_shared(tmp_path / "run", seconds=1)
    assert not (tmp_path / "run").exists()


def test_output_paths_are_facts(monkeypatch):
    flags = commands.flags.FlagValues()
    for name in ("out", "output", "sidecar"):
        commands.flags.DEFINE_string(name, None, "", flag_values=flags)
    flags(["command", "--output=captions.jsonl", "--sidecar=x"])
    monkeypatch.setattr(commands.flags, "FLAGS", flags)
    assert commands._output_paths() == {"--output": str(pathlib.Path("captions.jsonl").absolute())}
