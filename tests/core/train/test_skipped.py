"""The list and the count of skipped examples that a training run leaves behind."""

import json
import logging

import numpy as np
import pytest
from PIL import Image

from core_jax.data.bad import DataPolicy, TooManyBadExamples
from core_jax.data.folder import FolderSource
from core_jax.data.pipeline import make_batches
from tests.core.train import tiny_problem as tiny
from tests.core.train.test_loop import ListWriter, train


@pytest.fixture
def folder(tmp_path):
    """Twenty images; "007" is cut off."""
    (tmp_path / "images").mkdir()
    for i in range(20):
        noise = np.random.default_rng(i).integers(0, 255, (40, 40, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "images" / f"{i:03d}.png")
    cut = tmp_path / "images" / "007.png"
    cut.write_bytes(cut.read_bytes()[:-2000])
    return tmp_path / "images"


def batches_of(folder, **policy):
    """A batch is a whole epoch of 20 images, of which the model sees the pixels' means."""

    def row(image, example, rng):
        x = np.asarray(image, np.float32).reshape(-1)[: tiny.WIDTH] / 255
        return {"x": x, "y": x, "mask": np.float32(1)}

    return lambda start: make_batches(
        FolderSource(folder),
        batch_size=20, seed=0, start_step=start, transform=row, num_threads=1,
        prefetch_batches=1, policy=DataPolicy(**{"max_bad_fraction": 0.1} | policy),
    )  # fmt: skip


def listed(workdir, process=0):
    path = workdir / f"bad-process{process}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_skipped_image_is_counted_and_listed_once_over_all_resumptions(folder, tmp_path):
    writer, run = ListWriter(), tmp_path / "run"
    train(run, 2, make_batches=batches_of(folder), writers=writer, log_every=2)
    (entry,) = listed(run)
    assert entry["id"].startswith("007")
    assert entry["reason"] == "truncated"
    # One position of every epoch.
    assert writer.rows[0][1]["bad_fraction"] == pytest.approx(1 / 20)
    # Another image breaks; what was listed stays.
    other = folder / "003.png"
    other.write_bytes(b"")
    train(run, 4, make_batches=batches_of(folder))
    assert [line["id"][:3] for line in listed(run)] == ["007", "003"]
    # The first is mended before the run goes on: it was skipped once all the same.
    Image.new("RGB", (40, 40), (9, 99, 9)).save(folder / "007.png")
    train(run, 6, make_batches=batches_of(folder))
    assert [line["id"][:3] for line in listed(run)] == ["007", "003"]


def test_without_bad_images_there_is_no_list(folder, tmp_path):
    (folder / "007.png").unlink()
    Image.new("RGB", (40, 40), (9, 99, 9)).save(folder / "007.png")
    writer, run = ListWriter(), tmp_path / "run"
    train(run, 2, make_batches=batches_of(folder), writers=writer)
    assert not (run / "bad-process0.jsonl").exists()
    assert writer.rows[0][1]["bad_fraction"] == 0
    # Batches that skip nothing ever have no such number.
    train(tmp_path / "plain", 1, writers=writer)
    assert "bad_fraction" not in writer.rows[-1][1]


def test_the_list_is_there_when_too_many_end_the_run(folder, tmp_path):
    limits = {"max_bad_fraction": 0.01, "min_seen": 20}
    with pytest.raises(TooManyBadExamples):
        train(tmp_path / "run", 2, make_batches=batches_of(folder, **limits))
    assert [line["id"][:3] for line in listed(tmp_path / "run")] == ["007"]


def test_a_save_comes_with_the_list_and_a_full_disk_stops_nothing(
    folder, tmp_path, monkeypatch, caplog
):
    def full(*_):
        raise OSError("disk full")

    order = []
    save = "core_jax.train.loop.Checkpoints.save"
    run = tmp_path / "run"

    def saved(self, step, state):
        order.append((step, (run / "bad-process0.jsonl").exists()))

    with monkeypatch.context() as patched:
        patched.setattr(save, saved)
        train(run, 3, make_batches=batches_of(folder), save_every=1, log_every=100)
    assert order == [(1, True), (2, True), (3, True)]
    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr("core_jax.train.skipped.write_whole", full)
        assert train(tmp_path / "full", 3, make_batches=batches_of(folder)).step == 3
    assert "disk full" in caplog.text
    assert not (tmp_path / "full" / "bad-process0.jsonl").exists()
