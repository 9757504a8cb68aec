"""What the instance group's scripts do, run against a cloud that answers from files."""

import pytest

from launch import mig
from tests.launch.fake_cloud import FakeCloud
from tests.launch.requests import PLACE, request

FOUR, THREE = "h-0 h-1 h-2 h-3", "h-0 h-1 h-2"
STATE = "compute ssh&ActiveState"


@pytest.fixture
def cloud(tmp_path):
    return FakeCloud(tmp_path)


def _spot():
    return mig.launch(request("v6e:4x4", spot=True), PLACE).text


def test_a_machine_that_comes_back_bare_is_installed_on(cloud):
    # Installing, a round of all, a round without one, the one that is back, the end.
    cloud.answers("list-instances", FOUR, FOUR, FOUR, THREE, FOUR)
    cloud.answers(STATE, *["active"] * 4, "missing", *["failed"] * 3, "inactive")
    done = cloud.run(_spot())
    assert done.returncode == 0, done.stderr
    assert "3 of 4 hosts run" in done.stdout
    assert "the command is done" in done.stdout
    assert cloud.asked("compute scp") == 8  # at first, and again
    assert cloud.asked("create", "--default-action-on-vm-failure=repair") == 0  # it is there
    assert cloud.asked("--size=0") == 0


def test_machines_that_do_not_come_back_are_asked_for_anew(cloud):
    cloud.answers("list-instances", FOUR, *[THREE] * 15, FOUR)
    cloud.answers(STATE, *["missing"] * 4, "inactive")
    done = cloud.run(_spot())
    assert done.returncode == 0, done.stderr
    assert cloud.asked("resize", "--size=0") == 1
    assert cloud.asked("resize", "--size=4") == 2
    assert cloud.asked("compute scp") == 8


def test_a_failed_question_neither_ends_the_watch_nor_installs_again(cloud):
    cloud.answers("list-instances", FOUR, "!", FOUR)
    cloud.answers(STATE, "!", *["active"] * 3, "inactive")
    done = cloud.run(_spot())
    assert done.returncode == 0, done.stderr
    assert cloud.asked("compute scp") == 4


def test_a_command_that_failed_on_whole_machines_ends_the_watch(cloud):
    cloud.answers("list-instances", FOUR)
    cloud.answers(STATE, "failed")
    done = cloud.run(_spot())
    assert done.returncode == 1
    assert "failed too often" in done.stderr


@pytest.mark.parametrize(("hosts", "status", "told"), [(FOUR, 0, "4 of 4"), (THREE, 1, "3 of 4")])
def test_status_says_how_many_hosts_run_of_how_many(cloud, hosts, status, told):
    cloud.answers("targetSize", "4")
    cloud.answers("list-instances", hosts)
    cloud.answers(STATE, "active", "!", "active")
    done = cloud.run(mig.status("vlv-stage1", PLACE).text)
    assert done.returncode == status
    assert f"{told} hosts run" in done.stdout
    assert "h-0: active" in done.stdout
    assert "h-1: unreachable" in done.stdout


def test_what_is_left_of_a_group_that_is_gone_is_deleted(cloud):
    cloud.answers("list-instances", "!")
    assert cloud.run(mig.delete("vlv-stage1", PLACE).text).returncode == 0
    assert cloud.asked("instance-templates delete") == 1
