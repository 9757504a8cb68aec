import io
import json
import logging

import numpy as np
import pytest

from core_jax.train.hardware import peak_flops
from core_jax.train.metrics import (
    JsonlWriter,
    MultiWriter,
    ProgressWriter,
    TensorBoardWriter,
    default_writers,
    format_seconds,
)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_jsonl(tmp_path):
    writer = JsonlWriter(tmp_path / "deep" / "m.jsonl")
    writer.start(0, 10)
    writer.write(1, {"loss": 0.5, "bad": float("nan")})
    assert [r["loss"] for r in read(tmp_path / "deep/m.jsonl")] == [0.5]  # flushed already
    writer.write(2, {"loss": np.float32(0.25)})
    writer.close()
    rows = read(tmp_path / "deep/m.jsonl")
    assert rows[0]["bad"] is None
    assert [(r["step"], r["loss"]) for r in rows] == [(1, 0.5), (2, 0.25)]


def test_jsonl_drops_what_a_resumed_run_repeats(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    writer = JsonlWriter(path)
    writer.start(2, 10)
    writer.write(3, {"loss": 1.0})
    writer.close()
    assert [r["step"] for r in read(path)] == [1, 2, 3]


def test_tensorboard(tmp_path):
    writer = TensorBoardWriter(tmp_path / "tb")
    writer.start(0, 10)
    writer.write(1, {"loss": 0.5})
    writer.write_images(1, {"sample": np.zeros((4, 6, 3), np.uint8)})
    writer.close()
    (file,) = (tmp_path / "tb").iterdir()
    content = file.read_bytes()
    assert b"loss" in content
    assert b"sample" in content


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_lines():
    stream = io.StringIO()
    writer = ProgressWriter(stream)
    writer.start(0, 200)
    writer.write(100, {"loss": 0.12345, "images_per_second": 42.0, "steps_per_second": 0.5})
    writer.write(100, {"eval_score": 1.0})
    writer.write(150, {"loss": 0.1, "bad_fraction": 0.0025})
    writer.write(160, {"loss": 0.1, "bad_fraction": 0.0})
    writer.close()
    assert stream.getvalue() == (
        "train: step 100/200 50%  loss 0.1235  42 images/s  ETA 3m20s\n"
        "train: step 150/200 75%  loss 0.1  0.25% skipped\n"
        "train: step 160/200 80%  loss 0.1\n"
    )


def test_progress_overwrites_itself_on_a_terminal():
    stream = Terminal()
    writer = ProgressWriter(stream)
    writer.start(5, 20)
    writer.write(10, {"loss": 0.5})
    writer.write(20, {"loss": 0.25})
    writer.close()
    text = stream.getvalue()
    assert "resumed at step 5 of 20" in text
    assert text.count("\n") == 2
    assert text.endswith("loss 0.25\n")


def test_failing_writer_is_left_out_after_three_failures(caplog):
    class Broken:
        calls = 0

        def start(self, step, total_steps):
            pass

        def write(self, step, metrics):
            self.calls += 1
            raise OSError("disk full")

        def write_images(self, step, images):
            pass

        def close(self):
            pass

    broken, stream = Broken(), io.StringIO()
    writer = MultiWriter([broken, ProgressWriter(stream)])
    writer.start(0, 10)
    with caplog.at_level(logging.WARNING):
        for step in range(1, 7):
            writer.write(step, {"loss": 1.0})
    writer.close()
    assert broken.calls == 3
    assert caplog.text.count("disk full") == 3
    assert "left out from now on" in caplog.text
    assert stream.getvalue().count("\n") == 6


def test_unwritable_directory_stops_nothing(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    writer = default_writers(tmp_path / "file")
    writer.start(0, 10)
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert "JsonlWriter.start failed" in caplog.text


def test_default_writers_are_silent_elsewhere(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("core_jax.train.metrics.jax.process_index", lambda: 1)
    writer = default_writers(tmp_path)
    writer.start(0, 10)
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.4, "59s"), (75, "1m15s"), (7300, "2h01m"), (-3, "0s")]
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v4", 275e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("cpu", None),
    ],
)
def test_peak_flops(kind, flops):
    device = type("Device", (), {"device_kind": kind})()
    assert peak_flops(device) == flops
