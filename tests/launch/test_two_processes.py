"""Real processes on localhost, by the launcher and by hand: they agree, or all stop."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from launch.local import free_port

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = "tests/launch/tiny_config.py"
SLOW = pytest.mark.slow


def _environment(**more):
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return env | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"} | more


def _launch(workdir, variant="", *arguments, processes=2):
    words = [
        sys.executable, "-m", "launch", "local", f"--processes={processes}",
        f"--devices_per_process={8 // processes}", f"--config={CONFIG}:{variant}",
        f"--workdir={workdir}", "--grace_seconds=60", "--save_seconds=30", "--execute",
        "--", "tests.launch.tiny_command", *arguments,
    ]  # fmt: skip
    return subprocess.Popen(
        words, cwd=ROOT, env=_environment(), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=SLOW)])
def test_the_launcher_runs_processes_that_agree(tmp_path, processes):
    run = _launch(tmp_path, processes=processes)
    said, _ = run.communicate(timeout=240)
    assert run.returncode == 0, said
    for index in range(processes):
        assert f"[{index}] sum 8.0 over {processes} processes" in said
    result = json.loads((tmp_path / "result.json").read_text())
    assert re.search(r"sources [0-9a-f]{16}", result["code"])


def _by_hand(tmp_path, second=(), **second_env):
    """Two processes whose second has other flags or another environment."""
    port = free_port()
    started = []
    for index in range(2):
        env = _environment(
            JAX_NUM_CPU_DEVICES="4", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(index),
            JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
        )  # fmt: skip
        words = [
            sys.executable, "-m", "tests.launch.tiny_command", f"--config={CONFIG}",
            f"--workdir={tmp_path}", *(second if index else ()),
        ]  # fmt: skip
        started.append(subprocess.Popen(
            words, cwd=ROOT, env=env | (second_env if index else {}), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ))  # fmt: skip
    said = [process.communicate(timeout=240)[0] for process in started]
    return [process.returncode for process in started], said


@pytest.mark.parametrize(
    ("second", "env", "named"),
    [
        (("--config.run.mesh.data=8",), {}, "config.run.mesh.data: 8, elsewhere -1"),
        pytest.param(("--workdir=elsewhere",), {}, "--workdir: ", marks=SLOW),
        pytest.param(
            (), {"LAUNCH_SOURCES": "0" * 16}, "problem: this is not the code that was launched",
            marks=SLOW,
        ),
        pytest.param((), {"JAX_NUM_CPU_DEVICES": "2"}, "devices: 2, elsewhere 4", marks=SLOW),
    ],
)
def test_the_odd_one_is_named_and_all_stop(tmp_path, second, env, named):
    began = time.monotonic()
    codes, said = _by_hand(tmp_path, second, **env)
    assert codes == [1, 1]
    for text in said:  # every process says it, whichever log is read
        assert "process 1 (" in text
        assert named in text
        assert "sum " not in text
    assert not (tmp_path / "result.json").exists()
    assert time.monotonic() - began < 120  # of it nearly all is importing jax twice


def test_a_working_directory_that_is_not_shared_stops_all(tmp_path):
    """The same path to two folders, as it is with two hosts' own disks."""
    port, started = free_port(), []
    for index in range(2):
        (tmp_path / str(index)).mkdir()
        words = [
            sys.executable, "-m", "tests.launch.tiny_command", f"--config={ROOT / CONFIG}",
            "--workdir=/proc/self/cwd/run", "--share_seconds=3", "--num_processes=2",
            f"--process_id={index}", f"--coordinator_address=127.0.0.1:{port}",
        ]  # fmt: skip
        started.append(subprocess.Popen(
            words, cwd=tmp_path / str(index), env=_environment(JAX_NUM_CPU_DEVICES="4"), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ))  # fmt: skip
    said = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [1, 1]
    for text in said:
        assert "process 1 (" in text
        assert "does not see within 3 s what process 0 (" in text
        assert "sum " not in text
    assert not list((tmp_path / "0" / "run").iterdir())


@SLOW
def test_a_death_ends_the_others_and_is_named(tmp_path):
    run = _launch(tmp_path, "killed")
    said, _ = run.communicate(timeout=240)
    assert run.returncode == 137
    assert "[launch] process 1 died by SIGKILL" in said


@SLOW
def test_a_users_mistake_in_one_process_ends_all(tmp_path):
    run = _launch(tmp_path, "refuses")
    said, _ = run.communicate(timeout=240)
    assert run.returncode == 1
    assert "[1] process 1 of 2: error: a mistake of the user" in said


def test_sigterm_reaches_the_trainers_which_save_at_one_step(tmp_path):
    run = _launch(tmp_path, "", "--config.run.steps=2000")
    lines = []
    assert run.stdout is not None
    for line in run.stdout:
        lines.append(line)
        if "step 5" in line:
            break
    run.send_signal(signal.SIGTERM)
    said = "".join(lines) + run.communicate(timeout=240)[0]
    assert run.returncode == 143, said
    steps = re.findall(r"\[\d\] saved at step (\d+)", said)
    assert len(steps) == 2
    assert len(set(steps)) == 1
    assert json.loads((tmp_path / "result.json").read_text())["preempted"]
