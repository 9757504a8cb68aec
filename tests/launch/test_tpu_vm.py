"""What the TPU VMs' scripts do, run against a cloud that answers from files."""

import pytest

from launch import tpu_vm
from tests.launch.fake_cloud import FakeCloud
from tests.launch.requests import PLACE, request

DESCRIBE, STATE = "queued-resources describe", "tpu-vm ssh&ActiveState"
ABSENT = "!ERROR: NOT_FOUND: Resource was not found"
LOST = "!ERROR: UNAVAILABLE: the service is unavailable"


@pytest.fixture
def cloud(tmp_path):
    return FakeCloud(tmp_path)


def _script(spot):
    return tpu_vm.launch(request("v5e:4x4", spot=spot), PLACE).text


def test_a_question_that_fails_is_asked_again_later_each_time(cloud):
    cloud.answers(DESCRIBE, LOST, ABSENT, *["ACTIVE"] * 2, *[LOST] * 7, "ACTIVE")
    cloud.answers(STATE, "active", "inactive")
    done = cloud.run(_script(spot=True))
    assert done.returncode == 0, done.stderr
    assert "the service is unavailable" in done.stderr
    assert cloud.asked("queued-resources create") == 1  # where it said NOT_FOUND, and only there
    assert cloud.asked("tpu-vm scp") == 1
    assert cloud.slept() == [30, 60, 60, 30, 60, 120, 240, 480, 600, 600]


def test_machines_that_were_taken_are_asked_for_again(cloud):
    cloud.answers(DESCRIBE, ABSENT, "ACTIVE", "ACTIVE", "SUSPENDED", ABSENT, "ACTIVE")
    cloud.answers(STATE, "active", "inactive")
    cloud.answers("queued-resources delete", "!it is being deleted")
    done = cloud.run(_script(spot=True))
    assert done.returncode == 0, done.stderr
    assert cloud.asked("queued-resources create") == 2
    assert cloud.asked("tpu-vm scp") == 2


def test_a_request_that_fails_is_made_again(cloud):
    cloud.answers(DESCRIBE, ABSENT, ABSENT, "ACTIVE")
    cloud.answers("queued-resources create", "!no quota", "")
    cloud.answers(STATE, "inactive")
    done = cloud.run(_script(spot=True))
    assert done.returncode == 0, done.stderr
    assert cloud.asked("queued-resources create") == 2


def test_without_spot_it_waits_through_failed_questions_too(cloud):
    cloud.answers(DESCRIBE, LOST, ABSENT, "PROVISIONING", LOST, "ACTIVE")
    done = cloud.run(_script(spot=False))
    assert done.returncode == 0, done.stderr
    assert "waiting: PROVISIONING" in done.stdout
    assert cloud.asked("queued-resources create") == 1
    assert cloud.asked("tpu-vm scp") == 1


def test_a_resource_that_failed_ends_the_launch(cloud):
    cloud.answers(DESCRIBE, "FAILED")
    done = cloud.run(_script(spot=False))
    assert done.returncode == 1
    assert "the resource is FAILED" in done.stderr
