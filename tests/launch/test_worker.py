"""What a host is told: units by systemd's own check where it is installed, their shell by bash."""

import configparser
import os
import shlex
import shutil
import subprocess

import pytest

from launch import bucket, worker
from tests.launch.requests import CLOUD, request

JOB = request("v5p:4x4x8", **CLOUD)


def _parsed(text):
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str
    parser.read_string(text)
    return parser


def test_the_bucket_is_mounted_by_a_unit_that_outlives_the_command():
    assert "gcsfuse" not in worker.run_script(JOB) + worker.unit(JOB)
    command, mount = _parsed(worker.unit(JOB)), _parsed(bucket.unit(JOB))
    # After= also means that on a shutdown the mount ends after the command and its save.
    assert bucket.UNIT in command["Unit"]["After"].split()
    assert bucket.UNIT in command["Unit"]["Wants"].split()
    assert "Requires" not in command["Unit"]
    assert command["Service"]["ExecStartPre"] == mount["Service"]["ExecStartPost"] == bucket.WAIT
    assert mount["Service"]["Restart"] == "always"
    for when in ("ExecStartPre", "ExecStopPost"):  # of a dead gcsfuse nothing is left
        assert mount["Service"][when] == "-+/usr/bin/umount --lazy /bucket"
    assert mount["Service"]["ExecStart"].endswith(" my-bucket /bucket")


def test_without_a_bucket_nothing_is_mounted():
    job = request("v5e:16x16")
    texts = worker.unit(job), worker.setup_script(job), "\n".join(worker.staging(job))
    assert not any("bucket" in text for text in texts)


def test_setup_clears_the_mount_before_it_touches_the_folder():
    lines = worker.setup_script(JOB).splitlines()
    places = [
        next(i for i, line in enumerate(lines) if line.startswith(start))
        for start in (
            "sudo systemctl stop launch-bucket", "sudo umount --lazy", "sudo mkdir -p /bucket",
            "sudo systemctl restart launch-bucket", "sudo systemctl restart vlv-stage1",
        )
    ]  # fmt: skip
    assert places == sorted(places)


def test_the_command_waits_for_a_mount_that_answers(tmp_path):
    """First there is none, then a dead one, then a good one."""
    count = tmp_path / "count"
    count.write_text("")
    for name, fails in (("mountpoint", 1), ("stat", 3)):
        tool = tmp_path / name
        tool.write_text(f'#!/bin/bash\nprintf x >>{count}\n[ "$(wc -c <{count})" -gt {fails} ]\n')
        tool.chmod(0o755)
    (tmp_path / "sleep").symlink_to("/bin/true")
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    words = shlex.split(bucket.WAIT)  # as systemd splits it
    subprocess.run(words, env=env, check=True, timeout=30)
    assert len(count.read_text()) == 5


@pytest.mark.parametrize("name", ["vlv-stage1.service", bucket.UNIT])
def test_systemd_can_read_the_units(name, tmp_path):
    verify = shutil.which("systemd-analyze")
    if verify is None:
        pytest.skip("systemd-analyze is not installed")
    for file, text in (("vlv-stage1.service", worker.unit(JOB)), (bucket.UNIT, bucket.unit(JOB))):
        filled = text.replace("@HOME@", str(tmp_path)).replace("@USER@", "root")
        (tmp_path / file).write_text(filled)
    (tmp_path / "secrets.env").touch()
    told = subprocess.run(
        [verify, "verify", "--man=no", tmp_path / name],
        env=os.environ | {"SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
        capture_output=True,
        text=True,
        check=False,
    )
    ours = [line for line in told.stderr.splitlines() if str(tmp_path) in line or name in line]
    assert not ours
