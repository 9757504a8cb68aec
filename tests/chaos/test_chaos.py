"""The short form of `make chaos`: one job, one fault of each kind, and what must be noticed."""

import errno
import json
import random

import pytest

from tests.chaos.cases import Driver, is_clear
from tests.chaos.faults import Fault, Measured, damage_newest, draw
from tests.chaos.jobs import JOBS, find_job
from tests.chaos.processes import ROOT, Server
from tests.chaos.world import open_world


def test_a_seed_draws_one_schedule_and_another_seed_another():
    measured = Measured(seconds=10, changes=50)
    drawn = [draw(f"job {i}", measured, checkpoints=True, processes=2) for i in range(40)]
    assert drawn[3] == draw("job 3", measured, checkpoints=True, processes=2)
    assert drawn[3] != drawn[4]
    kinds = {fault.kind for schedule in drawn for fault in schedule}
    assert kinds == {"kill", "kill at a change", "term", "errno", "limit", "cut", "no marker",
                     "changed"}  # fmt: skip
    without = [draw(f"job {i}", measured, checkpoints=False, processes=1) for i in range(40)]
    assert not {f.kind for schedule in without for f in schedule} & {"cut", "no marker"}


def test_the_newest_checkpoint_is_damaged_only_beside_an_older_one(tmp_path):
    for step in (2, 10):
        assert damage_newest(tmp_path, "cut") == ""
        (tmp_path / f"checkpoints/{step}/d").mkdir(parents=True)
        (tmp_path / f"checkpoints/{step}/d/a").write_bytes(b"12345678")
        (tmp_path / f"checkpoints/{step}/_CHECKPOINT_METADATA").write_text("{}")
    assert "step 10" in damage_newest(tmp_path, "cut")
    assert (tmp_path / "checkpoints/10/d/a").read_bytes() == b"1234"
    assert "step 10" in damage_newest(tmp_path, "no marker")
    assert (tmp_path / "checkpoints/2/_CHECKPOINT_METADATA").exists()
    assert not (tmp_path / "checkpoints/10/_CHECKPOINT_METADATA").exists()


def test_every_kind_of_job_is_there_and_refuses_some_config():
    assert len({job.name for job in JOBS}) == len(JOBS) == 8
    assert all(job.changed and job.named for job in JOBS)
    assert {"vlv_jax.train", "massv_jax.train", "vlv_jax.cache", "vlv_jax.caption",
            "massv_jax.distill"} == {job.module for job in JOBS}  # fmt: skip


def test_a_full_disk_is_full_for_all_later_changes_too(tmp_path):
    """In a process of its own: an audit hook stays for good."""
    import subprocess
    import sys

    script = """
import errno, pathlib, sys
from tests.chaos.inject import sitecustomize
folder = pathlib.Path(sys.argv[1])
sitecustomize.install(f"{errno.ENOSPC}:2:{folder}")
pathlib.Path(sys.argv[2], "elsewhere").write_text("is not counted")
(folder / "one").write_text("1")
(folder / "two").write_text("2")
for name in ("three", "four"):
    try:
        (folder / name).write_text("3")
    except OSError as error:
        assert error.errno == errno.ENOSPC
        print(name, (folder / "one").read_text())
"""
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", script, str(inside), str(outside)], capture_output=True, text=True,
        check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.stdout.split() == ["three", "1", "four", "1"], done.stderr
    assert sorted(path.name for path in inside.iterdir()) == ["one", "two"]


def test_whatis_clear():
    several = "Traceback (of a thread)\nOSError: full\nerror: other settings:\n  seed is 1, not 2\n"
    assert is_clear(several)
    assert not is_clear("error: of a thread\nTraceback (most recent call last):\nKeyError: 1\n")
    assert not is_clear("Traceback (most recent call last):\nKeyError: 1\n")


@pytest.mark.slow
def test_a_job_survives_one_fault_of_each_kind(tmp_path):
    """Killed at a change of a file, cut, on a full disk; and a control that must be noticed."""
    job = find_job("massv phase 1")
    with Server(tmp_path / "scratch") as server:
        driver = Driver(tmp_path, open_world(tmp_path / "world"), server)
        driver.prepare(job)
        late = driver.measured[job.name].changes * 3 // 4
        schedule = [
            Fault(kind="kill at a change", change=late + random.Random(0).randrange(8)),
            Fault(kind="cut"),
            Fault(kind="errno", change=20, number=errno.ENOSPC),
            Fault(kind="limit", number=2**16),
            Fault(kind="changed"),
        ]
        case = driver.run(job, 0, schedule)
        assert case.kills == 1
        assert not case.wrong, case
        assert "ocdbt.process_0/d/" in case.faults[3], case  # TensorStore's write, not Python's
        # The control: a moment that is off by one bit, and a step that is told otherwise.
        outcome = driver.outcomes[job.name]
        name = next(name for name in outcome if "opt_state" in name)
        driver.outcomes[job.name] = outcome | {name: "another"}
        assert any(name in text for text in driver._finish(job, tmp_path / "case"))
    assert json.loads((tmp_path / "case" / "run.json").read_text())["starts"]
