"""What the batch script does when the tasks have ended; srun and scontrol are stand-ins."""

import os
import subprocess

import pytest

from launch import slurm
from tests.launch.requests import request


@pytest.fixture
def run(tmp_path):
    """Runs the script with tasks that end with a status; says whether it went back to the queue."""
    code = tmp_path / "code"
    code.mkdir()
    text = slurm.launch(
        request("h200:8", slices=2, max_restarts=2), slurm.Partition(code=str(code))
    ).text
    control = f'case $1 in show) echo "  JobState=$STATE" ;; *) echo "$@" >{tmp_path}/said ;; esac'
    for name, does in (("srun", 'exit "$TASKS"'), ("scontrol", control)):
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)

    def once(status, state="RUNNING"):
        said = tmp_path / "said"
        said.unlink(missing_ok=True)
        env = os.environ | {
            "PATH": f"{tmp_path}:{os.environ['PATH']}", "TASKS": str(status), "SLURM_JOB_ID": "7",
            "STATE": state,
        }  # fmt: skip
        done = subprocess.run(["bash", "-c", text], env=env, cwd=tmp_path, check=False)
        assert done.returncode == status
        return said.exists() and said.read_text() == "requeue 7\n"

    return once


def test_a_save_on_sigterm_goes_back_as_often_as_it_comes(run):
    assert all(run(143) for _ in range(5))


@pytest.mark.parametrize("status", [1, 75, 134, 137])
def test_failures_go_back_until_there_are_too_many(run, status):
    assert [run(status), run(143), run(status), run(status)] == [True, True, True, False]


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING"])
def test_what_somebody_cancelled_does_not_go_back(run, state):
    assert not run(143, state)


def test_what_is_done_does_not_go_back(run):
    assert not run(0)


def test_slurm_itself_brings_back_what_a_node_took_along():
    text = slurm.launch(request("h200:8"), slurm.Partition(code="c")).text
    assert "#SBATCH --requeue" in text
    assert "#SBATCH --signal=TERM@300" in text  # to the tasks, that long before the time is over
