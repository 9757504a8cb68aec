import json

import pytest

from core_jax.data import bench
from core_jax.data.bench import Pod, measure, pod_needs
from core_jax.data.resize import CropSpec
from core_jax.data.sources import SourceSpec, open_source
from tests.core.data.raw_tars import jpeg


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.jpg").write_bytes(jpeg(i, 80, 100))
    (folder / "bad.jpg").write_bytes(b"<html>")
    return folder


def test_measure_counts_what_it_read(folder):
    row = measure(
        open_source(SourceSpec(path=str(folder))), CropSpec(size=32), threads=2, batch_size=5,
        batches=4,
    )  # fmt: skip
    assert row["images"] == 20
    assert row["bad"] >= 1
    assert row["images_per_second"] == pytest.approx(20 / row["seconds"])
    assert row["images_per_core_second"] == pytest.approx(20 / row["cpu_seconds"])
    large = measure(
        open_source(SourceSpec(path=str(folder))), CropSpec(size=512), threads=1, batch_size=5,
        batches=4,
    )  # fmt: skip
    assert large["images_per_core_second"] < row["images_per_core_second"]


def test_needs():
    pods = (Pod("one", 4, 1, 10), Pod("two", 8, 2, 10))
    rows = pod_needs(20.0, images_per_chip=2, step_seconds=0.04, pods=pods)
    assert [row["images_per_second"] for row in rows] == [200, 400]
    assert [row["cores_per_host"] for row in rows] == [10, 10]
    assert [row["fed"] for row in rows] == [True, True]
    assert [row["most_images_per_second"] for row in rows] == [200, 400]
    rows = pod_needs(19.0, images_per_chip=2, step_seconds=0.04, pods=pods)
    assert not rows[0]["fed"]
    rows = pod_needs(20.0, images_per_second=300, pods=pods)
    assert [(row["cores"], row["fed"]) for row in rows] == [(15, False), (15, True)]
    assert "fed" not in pod_needs(20.0, pods=pods)[0]
    for wrong in ({"images_per_chip": 1}, {"images_per_second": 0},
                  {"images_per_second": 1, "images_per_chip": 1, "step_seconds": 1}):  # fmt: skip
        with pytest.raises(ValueError, match=r"together|larger|not both"):
            pod_needs(1.0, **wrong)


def test_pods_are_whole():
    for pod in bench.PODS:
        assert pod.chips % pod.hosts == 0
        assert pod.chips // pod.hosts in (4, 8)


def test_command(folder, tmp_path, capsys):
    argv = ["--from", str(folder), "--size", "32", "--batches", "1", "--batch-size", "4"]
    argv += ["--max-threads", "2", "--json", str(tmp_path / "r.json")]
    assert bench.main([*argv, "--images-per-second", "1e9"]) == 0
    text = capsys.readouterr().out
    assert "v5e-256" in text
    assert "too few" in text
    report = json.loads((tmp_path / "r.json").read_text())
    assert [row["threads"] for row in report["measured"]] == [1, 2]
    assert len(report["pods"]) == len(bench.PODS)
    assert bench.main([*argv, "--images-per-second", "1"]) == 0
    assert "too few" not in capsys.readouterr().out
    assert bench.main([*argv, "--step-seconds", "1"]) == 2
    assert "go together" in capsys.readouterr().err
    assert bench.main(["--from", str(tmp_path / "none")]) == 2
