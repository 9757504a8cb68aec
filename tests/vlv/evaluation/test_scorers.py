"""Scorers by import path: loading, the contract, and aggregation."""

import types

import numpy as np
import pytest

from vlv_jax.evaluation.scorers import aggregate, count_rows, load_scorer, run_scorer


def words_found(references, captions):
    """A scorer: which words of the reference does the caption name?"""
    rows = []
    for reference, caption in zip(references, captions, strict=True):
        said, true = set(caption.split()), set(reference.split())
        both = len(said & true)
        rows.append({
            "word.tp_pred": both, "word.pred": len(said),
            "word.tp_ref": both, "word.ref": len(true), "length": len(caption.split()),
        })  # fmt: skip
    return rows


def test_counts_become_precision_recall_f1_and_means():
    rows = run_scorer(words_found, ["a b", "c d e f"], ["a x y z", "c"])
    estimates = aggregate(rows, seed=2, num_resamples=200)
    assert {k: round(e.value, 6) for k, e in estimates.items()} == {
        "word_precision": 0.4,
        "word_recall": round(2 / 6, 6),
        "word_f1": round(2 * 0.4 * (2 / 6) / (0.4 + 2 / 6), 6),
        "length": 2.5,
    }
    assert all(e.low <= e.value <= e.high and e.seed == 2 for e in estimates.values())
    np.testing.assert_array_equal(count_rows(rows, "word"), [[1, 4, 1, 2], [1, 1, 1, 4]])


def test_the_miniatures_scorer_keeps_the_contract():
    scenes = pytest.importorskip("miniature.world.scenes")
    captions = pytest.importorskip("miniature.world.captions")
    world = [scenes.sample_scene(0, i, "train") for i in range(12)]
    told = [captions.describe(scene) for scene in world]
    scorer = load_scorer("miniature.world.scoring:scorer")
    right = aggregate(run_scorer(scorer, world, told), num_resamples=50)
    assert right["object_f1"].value == 1
    assert right["relation_f1"].value == 1
    wrong = aggregate(run_scorer(scorer, world, told[1:] + told[:1]), num_resamples=50)
    assert wrong["object_f1"].value < 0.5


def test_load_scorer_by_import_path(monkeypatch):
    module = types.ModuleType("some_scorers")
    module.words_found, module.number = words_found, 3
    monkeypatch.setitem(__import__("sys").modules, "some_scorers", module)
    assert load_scorer("some_scorers:words_found") is words_found
    with pytest.raises(ValueError, match="must have the form"):
        load_scorer("some_scorers.words_found")
    with pytest.raises(ValueError, match="has no 'word_found'; it has number, words_found"):
        load_scorer("some_scorers:word_found")
    with pytest.raises(ValueError, match="is a int"):
        load_scorer("some_scorers:number")
    with pytest.raises(ImportError, match="cannot import 'no_such_package'"):
        load_scorer("no_such_package:words_found")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"x": 1}], "1 examples for 2 captions"),
        ([{"x": 1}, {"y": 1}], "differs from example 0 in x, y"),
        ([{"x": 1}, {"x": "2"}], "x of example 1 is '2'"),
        ([{"x": 1}, {"x": float("nan")}], "x of example 1 is nan"),
        ([{"m.pred": 1}, {"m.pred": 1}], "lack m.tp_pred, m.tp_ref, m.ref"),
    ],
)
def test_broken_contracts_are_named(rows, message):
    with pytest.raises(ValueError, match=message):
        run_scorer(lambda references, captions: rows, [1, 2], ["a", "b"])


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="2 references and 1 captions"):
        run_scorer(words_found, ["a", "b"], ["a"])
