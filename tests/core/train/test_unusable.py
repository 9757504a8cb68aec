"""Examples that a run could not use are listed in its directory, over all of its starts."""

import json
import logging

import pytest

from core_jax.data.bad import BadLog, DataPolicy
from core_jax.data.images import Reason
from core_jax.train.unusable import FOLDER, UnusableExamples
from tests.core.train import tiny_problem as tiny
from tests.core.train.test_loop import train


class _Batches:
    """Endless batches, one example of which is replaced where `bad` says so."""

    def __init__(self, start, bad):
        self._batches, self._step, self._wrong = tiny.batches(start), start, bad
        self.bad = BadLog(DataPolicy())

    def __iter__(self):
        return self

    def __next__(self):
        name = self._wrong.get(self._step)
        self.bad.add([(name, Reason.TRUNCATED)] if name else [])
        self._step += 1
        return next(self._batches)


def _listed(folder):
    return json.loads((folder / FOLDER / "process-0.json").read_text())


def test_a_run_lists_them_and_goes_on_with_the_list(tmp_path, caplog):
    bad = {1: "first.jpg", 3: "second.jpg"}
    with caplog.at_level(logging.WARNING):
        train(tmp_path, 2, make_batches=lambda start: _Batches(start, bad))
        assert _listed(tmp_path) == {"first.jpg": "truncated"}
        train(tmp_path, 4, make_batches=lambda start: _Batches(start, bad))
    assert _listed(tmp_path) == {"first.jpg": "truncated", "second.jpg": "truncated"}
    said = [r.message for r in caplog.records if "could not be used" in r.message]
    assert [text.split()[0] for text in said] == ["1", "2"]
    assert "truncated 2" in said[1]


def test_a_clean_run_lists_nothing(tmp_path):
    train(tmp_path, 2, make_batches=lambda start: _Batches(start, {}))
    train(tmp_path, 4)  # batches that say nothing of bad ones
    assert not (tmp_path / FOLDER).exists()


def test_a_list_that_cannot_be_written_stops_nothing(tmp_path, caplog):
    (tmp_path / FOLDER).write_text("a file where the folder should be")
    batches = _Batches(0, {0: "a.jpg"})
    next(batches)
    unusable = UnusableExamples(str(tmp_path), 0)
    with caplog.at_level(logging.WARNING):
        unusable.update(batches)
    assert unusable.ids == {"a.jpg": "truncated"}
    assert "was not written" in caplog.text


@pytest.mark.parametrize("again", [False, True])
def test_nothing_is_said_twice(tmp_path, caplog, again):
    batches = _Batches(0, {0: "a.jpg", 1: "a.jpg" if again else "b.jpg"})
    unusable = UnusableExamples(str(tmp_path), 0)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            next(batches)
            unusable.update(batches)
    assert len(caplog.records) == (1 if again else 2)
