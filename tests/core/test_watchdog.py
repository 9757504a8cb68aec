"""Real processes, one of which hangs or dies: the others name it within the set time."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from core_jax.watchdog import HUNG, Watchdog

ROOT = pathlib.Path(__file__).parents[2]
# A loop without jax, so that processes start at once. The barrier is a file for each step, as a
# collective would be: nobody goes on alone.
WORKER = """
import os, pathlib, signal, sys, time
from core_jax.watchdog import Watchdog

index, count, fault = int(sys.argv[1]), int(sys.argv[2]), sys.argv[4]
folder = pathlib.Path(sys.argv[3])

def read_a_mount_that_is_gone():
    time.sleep(60)

options = {"seconds": 1.5, "index": index, "peers": range(count)}
with Watchdog(
    folder / "heartbeats", place="loading the weights", before_others=True, **options
) as watchdog:
    if index == 1 and fault == "hang while loading":
        for part in range(9):
            watchdog.at("loading the weights")
        read_a_mount_that_is_gone()
    if index == 1 and fault == "die while loading":
        os.kill(os.getpid(), signal.SIGKILL)
with Watchdog(folder / "heartbeats", **options) as watchdog:
    for step in range(30):
        watchdog.at(f"loading the batch of step {step}")
        if index == 1 and step == 3 and fault == "hang":
            read_a_mount_that_is_gone()
        if index == 1 and step == 3 and fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 0 and step == 3 and fault.startswith("raise"):
            time.sleep(0.5)
            raise RuntimeError("connection closed by peer")
        if index == 1 and step == 3 and fault == "raise after a death":
            os.kill(os.getpid(), signal.SIGKILL)
        watchdog.at(f"step {step}")
        (folder / f"{step}-{index}").touch()
        while not all((folder / f"{step}-{i}").exists() for i in range(count)):
            time.sleep(0.01)
print("through", flush=True)
"""


def start(folder, fault, count):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(index), str(count), str(folder), fault],
            cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for index in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("fault", ["none", "hang", "die"])
def test_the_one_that_hangs_or_died_is_named_by_the_others(tmp_path, fault):
    began = time.monotonic()
    processes = start(tmp_path, fault, 3)
    said = [process.communicate(timeout=100)[0] for process in processes]
    codes = [process.returncode for process in processes]
    if fault == "none":
        assert codes == [0, 0, 0]
        assert all(text == "through\n" for text in said)
        assert not (tmp_path / "heartbeats").exists()
        return
    assert codes == [HUNG, HUNG if fault == "hang" else -signal.SIGKILL, HUNG]
    assert time.monotonic() - began < 60
    for index in (0, 2):
        assert "through" not in said[index]
        if fault == "die":
            assert "process 1 (" in said[index]
            assert "gives no sign of life" in said[index]
        else:
            assert "hangs at loading the batch of step 3" in said[index]
            assert "read_a_mount_that_is_gone" in said[index]  # its stack, in the others' logs
    if fault == "hang":
        assert "read_a_mount_that_is_gone" in said[1]


def test_one_that_hangs_while_it_loads_is_named_by_those_that_are_through(tmp_path):
    processes = start(tmp_path, "hang while loading", 3)
    said = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [HUNG] * 3
    for text in said:
        assert "process 1 (" in text
        assert "hangs at loading the weights" in text
        assert "read_a_mount_that_is_gone" in text


def test_one_that_dies_while_it_loads_is_named(tmp_path):
    processes = start(tmp_path, "die while loading", 2)
    said = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [HUNG, -signal.SIGKILL]
    assert "process 1 (" in said[0]
    assert "gives no sign of life" in said[0]


@pytest.mark.parametrize("fault", ["raise", "raise after a death"])
def test_an_error_says_whose_death_it_may_come_from(tmp_path, fault):
    processes = start(tmp_path, fault, 2)
    said = [process.communicate(timeout=100)[0] for process in processes]
    assert "RuntimeError: connection closed by peer" in said[0]
    told = "gives no sign of life: look there first" in said[0]
    assert told == (fault == "raise after a death")
    if fault == "raise":  # and the other one does not wait for ever
        assert processes[1].returncode == HUNG
        assert "process 0 (" in said[1]


def test_one_that_works_by_itself_ends_alone(tmp_path):
    """Two share a folder, as caching processes do; the other's standstill is not theirs."""
    ended = []
    with (
        Watchdog(tmp_path, seconds=0.4, index=0, end=ended.append) as moving,
        Watchdog(tmp_path, seconds=0.4, index=1, end=ended.append) as hanging,
    ):
        hanging.at("image 32 of 64")
        for number in range(16):
            moving.at(f"image {number}")
            time.sleep(0.1)
    (text,) = ended
    assert text.startswith("nothing has moved for 0.4 s: process 1 (")
    assert "hangs at image 32 of 64. It ends; the same command goes on" in text
    assert "test_one_that_works_by_itself" in text  # its stack


def test_one_that_moves_is_left_alone_and_zero_watches_nothing(tmp_path):
    ended = []
    with Watchdog(tmp_path / "a", seconds=0.4, end=ended.append) as watchdog:
        for step in range(12):
            watchdog.at(f"step {step}")
            time.sleep(0.1)
    with Watchdog(tmp_path / "b", seconds=0, end=ended.append) as watchdog:
        watchdog.at("a step")
        time.sleep(0.6)
    assert not ended
    assert not (tmp_path / "b").exists()
    with Watchdog(tmp_path / "a", seconds=0.4, end=ended.append):  # the twin
        time.sleep(1.2)
    assert "hangs at the start" in ended[0]


def test_a_job_that_is_refused_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="refused"), Watchdog(tmp_path / "run" / "x", seconds=9):
        raise ValueError("refused")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="refused"), Watchdog(tmp_path / "run" / "x", seconds=9):
        raise ValueError("refused")
    assert not list((tmp_path / "run").iterdir())
