"""core_jax.data.prepare on Apache Beam's local runner, in processes that are killed, too."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("apache_beam")

from core_jax.data import prepare
from core_jax.data.prepare_options import Options
from core_jax.data.sources import SourceSpec
from tests.core.data.raw_tars import tree, without_beam, write_mixture
from tests.core.data.test_prepare import RULES

OPTIONS = Options(rules=RULES, examples_per_shard=8, examples_per_unit=7)


def run(folder, out, options=OPTIONS, **fields):
    spec = SourceSpec(path=str(folder))
    return prepare.prepare(spec, out, name="raw", options=options, **fields)


def test_beam_gives_what_one_thread_gives(tmp_path, monkeypatch):
    write_mixture(tmp_path / "tars")
    path, summary, worked = run(tmp_path / "tars", tmp_path / "beam")
    assert worked
    assert summary["kept"] == 32
    assert not run(tmp_path / "tars", tmp_path / "beam")[2]
    import core_jax.data

    monkeypatch.setattr(core_jax.data, "prepare_pipeline", without_beam())
    assert tree(run(tmp_path / "tars", tmp_path / "here")[0]) == tree(path)
    fewer = dataclasses.replace(OPTIONS, rules=dataclasses.replace(RULES, near_distance=None))
    assert tree(run(tmp_path / "tars", tmp_path / "fewer", fewer)[0]) != tree(path)


def command(folder, out, *more):
    argv = [
        sys.executable, "-m", "core_jax.data.prepare", "--from", str(folder), "--out", str(out),
        "--name", "raw", "--side-above", "32", "--examples-per-shard", "16",
        "--examples-per-unit", "32", *more,
    ]  # fmt: skip
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["looks", "shards"])
def test_killed_and_started_again(tmp_path, where):
    write_mixture(tmp_path / "tars", good=400)
    whole = command(tmp_path / "tars", tmp_path / "whole")
    assert "shards" in whole.communicate()[0]
    assert whole.returncode == 0
    killed = command(tmp_path / "tars", tmp_path / "killed")
    path = tmp_path / "killed" / "raw" / "1.0.0"
    done = path / ".prepare-train" / where
    deadline = time.monotonic() + 120
    while not (done.exists() and len(list(done.glob("0*"))) >= 3):
        assert killed.poll() is None, "it was over before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not (path / "prepare-train.json").exists()
    # What was half written must not be taken for whole.
    torn = tmp_path / "torn"
    shutil.copytree(tmp_path / "killed", torn)
    before = sorted(f.stem for f in done.glob("0*"))
    written = {f: f.stat().st_mtime_ns for f in path.glob("*.array_record-*")}
    again = command(tmp_path / "tars", tmp_path / "killed")
    text = again.communicate()[0]
    assert again.returncode == 0, text
    assert len(before) >= 3
    want = tree(tmp_path / "whole" / "raw" / "1.0.0")
    assert tree(path) == want
    # The control: a finished piece with other contents shows in the result.
    if where == "shards":
        finished = {f: t for f, t in written.items() if f.name.split("-")[2] in before}
        assert len(finished) == len(before)
        assert {f: f.stat().st_mtime_ns for f in finished} == finished  # not written again
        (shard,) = (torn / "raw" / "1.0.0").glob(f"*.array_record-{before[0]}-of-*")
        shard.write_bytes(b"x" * shard.stat().st_size)  # one of another length is made anew
        command(tmp_path / "tars", torn).communicate()
        assert tree(torn / "raw" / "1.0.0") != want


@pytest.mark.slow
def test_several_processes(tmp_path):
    write_mixture(tmp_path / "tars", good=100)
    texts = []
    for name, more in (("one", ()), ("two", ("--workers", "2"))):
        process = command(tmp_path / "tars", tmp_path / name, *more)
        texts.append(process.communicate()[0])
        assert process.returncode == 0, texts[-1]
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
