"""Arms of ablations: paired over images, ratios from sums, several seeds; what is refused."""

import json

import numpy as np
import pytest

from core_jax.evaluation.bootstrap import bootstrap_difference, bootstrap_f1, micro_f1
from core_jax.evaluation.report import Report
from vlv_jax.compare import main, parse_arms
from vlv_jax.evaluation.arm_report import compare
from vlv_jax.evaluation.arms import ArmsError, compare_arms, load_arm, trained_with
from vlv_jax.evaluation.examples import (
    ExamplesError,
    examples_file,
    load_scores,
    measure,
    measures_of,
    save_examples,
)

N = 60
COUNTS = ("tp_pred", "pred", "tp_ref", "ref")
TRUTH = np.random.default_rng(5).integers(1, 5, N)


def _counts(skill, seed):
    """Per-image counts of a model that finds each object with this chance."""
    found = np.random.default_rng(seed).binomial(TRUTH, skill)
    return np.stack([found, TRUTH, found, TRUTH], axis=1)


def write_run(path, *, skill=0.8, seed=0, ids=None, settings=None, config=None, stored=True):
    """A directory as `evaluate` leaves it; returns its counts."""
    path.mkdir(parents=True)
    counts = _counts(skill, seed)
    ids = ids or [f"image{i}" for i in range(N)]
    rng = np.random.default_rng(seed)
    rows = [
        {
            "id": name,
            "scores": {
                **{f"caption.object.{p}": int(c) for p, c in zip(COUNTS, row, strict=True)},
                "caption.rouge_l": float(row[0] / row[3]),
                "stage1.denoising_loss.vlv": 0.1 + 0.01 * float(rng.random()),
                "stage1.denoising_loss.none": 0.2 + 0.01 * float(rng.random()),
            },
        }
        for name, row in zip(ids, counts, strict=True)
    ]
    save_examples(path / examples_file("captions"), rows)
    if stored:
        config = {"run": {"seed": seed, "steps": 10}, "model": {"num_queries": 77}} | (config or {})
        report = Report("run", {"workdir": str(path), "config": config})
        for name in ("caption.object_f1", "caption.rouge_l",
                     "stage1.denoising_loss_difference.vlv_minus_none"):  # fmt: skip
            found = measure(load_scores(path), name)
            value = found.statistic(found.rows.sum(axis=0))
            report.add_metric("vlv", name, float(value), n=N, seed=0,
                              settings={"sampling.num_beams": 1} | (settings or {}))  # fmt: skip
        report.write(path)
    return counts


@pytest.fixture
def runs(tmp_path):
    for seed in range(3):
        write_run(tmp_path / f"full{seed}", skill=0.9, seed=seed)
    write_run(tmp_path / "none", skill=0.5, seed=9, config={"model": {"num_queries": 16}})
    write_run(tmp_path / "same", skill=0.9, seed=20)
    return tmp_path


def test_one_run_each_is_the_paired_bootstrap_of_the_ratio(runs):
    arms = [load_arm("full", [runs / "full0"]), load_arm("none", [runs / "none"])]
    options = {"seed": 3, "num_resamples": 200}
    full, none = compare_arms(arms, "caption.object_f1", baseline="full", **options)
    order = np.argsort([f"image{i}" for i in range(N)])  # examples are sorted by id
    a, b = _counts(0.9, 0)[order], _counts(0.5, 9)[order]
    expected = bootstrap_difference(b, a, micro_f1, **options)
    assert none.difference == expected
    assert full.mean == bootstrap_f1(a, **options)
    assert full.difference is None
    assert none.difference.value == pytest.approx(none.mean.value - full.mean.value)
    assert none.difference.high < 0
    # A mean of per-image values would be another number.
    mean_of_ratios = np.mean(a[:, 0] / a[:, 3])
    assert abs(mean_of_ratios - full.mean.value) > 1e-3


def test_several_seeds_are_averaged_run_by_run(runs):
    arms = [
        load_arm("full", [runs / f"full{i}" for i in range(3)]),
        load_arm("none", [runs / "none"]),
    ]
    full, none = compare_arms(arms, "caption.object_f1", baseline="full", num_resamples=100)
    values = [float(micro_f1(_counts(0.9, seed).sum(axis=0))) for seed in range(3)]
    assert full.values == pytest.approx(values)
    assert full.mean.value == pytest.approx(np.mean(values))
    assert full.mean.n == N  # images, not images times seeds
    assert full.seeds == (0, 1, 2)
    assert none.difference.value == pytest.approx(none.values[0] - np.mean(values))
    # Averaging runs makes the interval narrower than one run's.
    one = compare_arms(arms[:1], "caption.object_f1", num_resamples=100)[0]
    single = compare_arms([load_arm("x", [runs / "full0"])], "caption.object_f1",
                          num_resamples=100)[0]  # fmt: skip
    assert one.mean.high - one.mean.low < single.mean.high - single.mean.low


def test_arms_that_do_not_differ_include_zero(runs):
    arms = [load_arm("full", [runs / "full1"]), load_arm("same", [runs / "same"])]
    found = compare_arms(arms, "caption.object_f1", baseline="full", num_resamples=500)[1]
    assert not found.difference.excludes_zero
    itself = [load_arm("a", [runs / "full1"]), load_arm("b", [runs / "full1"])]
    zero = compare_arms(itself, "caption.object_f1", baseline="a", num_resamples=50)[1].difference
    assert (zero.value, zero.low, zero.high) == (0, 0, 0)


def test_the_report_has_every_number_with_its_circumstances(runs):
    out = runs / "out"
    arms = [
        load_arm("full", [runs / f"full{i}" for i in range(3)]),
        load_arm("none", [runs / "none"]),
    ]
    compare(arms, ["caption.object_f1"], out, section="vlv.ablations.T7", baseline="full",
            note="A remark.", num_resamples=100)  # fmt: skip
    found = json.loads((out / "report.json").read_text())["vlv"]["ablations"]["T7"]["caption"]
    full = found["object_f1"]["full"]
    assert full["n"] == N
    assert full["settings"]["training_seeds"] == [0, 1, 2]
    assert full["settings"]["sampling.num_beams"] == 1
    assert full["settings"]["range"] == [min(full["settings"]["per_run"]),
                                         max(full["settings"]["per_run"])]  # fmt: skip
    difference = found["object_f1_difference"]["none_minus_full"]
    assert difference["settings"]["excludes_zero"] is True
    assert difference["interval"][1] < 0
    page = (out / "report.html").read_text()
    for text in (
        "<svg class='plot'",
        "A remark.",
        "range over seeds",
        "0, 1, 2",
        "model.num_queries",
    ):
        assert text in page
    assert "Careful" not in page
    # Compared again with other arms: nothing of the old ones stays, other metrics do.
    compare(arms[:1], ["caption.rouge_l"], out, section="vlv.ablations.T7", baseline="full",
            num_resamples=20)  # fmt: skip
    compare([arms[0], load_arm("same", [runs / "same"])], ["caption.object_f1"], out,
            section="vlv.ablations.T7", baseline="full", num_resamples=20)  # fmt: skip
    found = json.loads((out / "report.json").read_text())["vlv"]["ablations"]["T7"]["caption"]
    assert found["object_f1"].keys() == {"full", "same"}
    assert "rouge_l" in found


def test_one_arm_is_the_mean_over_its_seeds(runs):
    out = runs / "out"
    arm = load_arm("vlv", [runs / f"full{i}" for i in range(3)])
    results = compare([arm], ["all"], out, section="vlv", num_resamples=50)
    report = json.loads((out / "report.json").read_text())["vlv"]
    assert report["caption"]["object_f1"]["settings"]["training_seeds"] == [0, 1, 2]
    assert report["caption"]["object_recall"]["n"] == N
    difference = report["stage1"]["denoising_loss_difference"]["vlv_minus_none"]
    losses = report["stage1"]["denoising_loss"]
    assert difference["value"] == pytest.approx(losses["vlv"]["value"] - losses["none"]["value"])
    assert difference["settings"]["excludes_zero"] is True
    assert len(results) == 7
    assert "Objects right (F1)" in (out / "report.html").read_text()  # a headline
    # Other runs' metrics come into the same section without pushing these out.
    compare([arm], ["stage1.denoising_loss.vlv"], out, section="vlv", num_resamples=50)
    report = json.loads((out / "report.json").read_text())["vlv"]
    assert "object_f1" in report["caption"]
    assert report["stage1"].keys() == {"denoising_loss"}


def test_what_arms_were_trained_with(runs):
    arms = [load_arm("full", [runs / "full0", runs / "full1"]), load_arm("none", [runs / "none"])]
    assert trained_with(arms, "caption.object_f1") == {"model.num_queries": ["77", "16"]}


def test_different_settings_are_said(runs):
    write_run(runs / "beams", seed=30, settings={"sampling.num_beams": 4})
    write_run(runs / "bare", seed=31, stored=False)
    arms = [load_arm(n, [runs / n]) for n in ("same", "beams", "bare")]
    compare(arms, ["caption.object_f1"], runs / "out", section="a", num_resamples=20)
    page = (runs / "out" / "report.html").read_text()
    assert "Careful: the runs were evaluated with different sampling.num_beams: 1, 4, none" in page
    assert "bare was evaluated is not known" in page


def test_runs_that_do_not_belong_together_are_refused(runs, tmp_path):
    write_run(runs / "others", seed=1, ids=[f"image{i + 1}" for i in range(N)])
    arms = [load_arm("a", [runs / "full0"]), load_arm("b", [runs / "others"])]
    with pytest.raises(ArmsError, match="2 are in one only, such as image0;"):
        compare_arms(arms, "caption.object_f1")
    file = runs / "full1" / examples_file("captions")
    lines = file.read_text().splitlines()
    first = json.loads(lines[3])
    first["scores"]["caption.object.ref"] += 1
    file.write_text("\n".join([*lines[:3], json.dumps(first), *lines[4:]]) + "\n")
    changed = [load_arm("a", [runs / "full0"]), load_arm("b", [runs / "full1"])]
    with pytest.raises(ArmsError, match="ground truth of image3 is another"):
        compare_arms(changed, "caption.object_f1")
    with pytest.raises(ArmsError, match="different evaluations, evaluate it again"):
        changed[1].runs[0].entry("caption.object_f1")


def test_misuse_is_refused(runs):
    arms = [load_arm("full", [runs / "full0"]), load_arm("none", [runs / "none"])]
    with pytest.raises(ArmsError, match="baseline 'fall' is none of"):
        compare_arms(arms, "caption.object_f1", baseline="fall")
    with pytest.raises(
        ArmsError, match=r"no saved metric 'caption.objekt_f1'; .*caption.object_f1"
    ):
        compare_arms(arms, "caption.objekt_f1")
    with pytest.raises(ArmsError, match="two arms have one name"):
        compare_arms([arms[0], arms[0]], "caption.object_f1")
    with pytest.raises(ArmsError, match="letters, digits"):
        load_arm("0.5B", [runs / "full0"])
    with pytest.raises(ArmsError, match="twice"):
        load_arm("x", [runs / "full0", runs / "none" / ".." / "full0"])
    with pytest.raises(ArmsError, match=r"run `python -m vlv_jax\.evaluate`"):
        load_arm("x", [runs])
    with pytest.raises(ArmsError, match="own report"):
        compare(arms, ["caption.object_f1"], runs / "none", section="a")
    with pytest.raises(ArmsError, match="name=DIR"):
        parse_arms(["full"])
    assert parse_arms(["a=x,y", "b=z", "a=w"]) == {"a": ["x", "y", "w"], "b": ["z"]}


def test_the_command(runs, capsys):
    main([
        "--arms", f"full={runs}/full0,{runs}/full1", f"none={runs}/none", "--baseline", "full",
        "--metric", "caption.object_f1,caption.rouge_l", "--out", str(runs / "out"),
        "--section", "vlv.x", "--bootstrap_samples", "50",
    ])  # fmt: skip
    out = capsys.readouterr().out
    assert "caption.object_f1 none: 0.5" in out
    assert "excludes 0: yes" in out
    report = json.loads((runs / "out" / "report.json").read_text())
    assert report["vlv"]["x"]["caption"]["rouge_l"]["none"]["num_resamples"] == 50
    with pytest.raises(SystemExit, match="error: the baseline"):
        main(["--arms", f"a={runs}/none", "--baseline", "b", "--metric", "caption.object_f1",
              "--out", str(runs / "out"), "--section", "x"])  # fmt: skip


def test_every_kind_of_score(tmp_path):
    scores = {"caption.bleu": [1, 0, 0, 0, 2, 1, 0, 0, 2, 2], "vqa.accuracy.vlv": [2.0, 3],
              "caption.tokens": 7}  # fmt: skip
    save_examples(tmp_path / "evaluated_x.jsonl", [
        {"id": "b", "scores": scores}, {"id": "a", "scores": scores | {"vqa.accuracy.vlv": [0, 1]}},
        {"id": "c", "text": "no scores"},
    ])  # fmt: skip
    found = load_scores(tmp_path)

    def value(name):
        m = measure(found, name)
        assert m.ids == ("a", "b")
        return float(m.statistic(m.rows.sum(axis=0)))

    assert value("caption.bleu_1") == pytest.approx(0.5, abs=1e-6)
    assert value("vqa.accuracy.vlv") == pytest.approx(0.5)  # 2 of 4, not the mean of shares
    assert value("caption.tokens") == 7
    assert measures_of(found) == [
        *(f"caption.bleu_{k}" for k in range(1, 5)), "caption.tokens", "vqa.accuracy.vlv"
    ]  # fmt: skip
    with pytest.raises(ExamplesError, match=r"no saved metric 'caption\.bleu'"):
        measure(found, "caption.bleu")


@pytest.mark.parametrize(("line", "message"), [
    ({"id": "a", "scores": {"x": 1.0}}, "second x"),
    ({"id": "b", "scores": {"x": float("nan")}}, "is nan"),
    ({"id": "b", "scores": {"x": "1"}}, "is '1'"),
])  # fmt: skip
def test_broken_scores_are_named(tmp_path, line, message):
    rows = [{"id": "a", "scores": {"x": 1.0}}, line]
    save_examples(tmp_path / "evaluated_x.jsonl", rows)
    with pytest.raises(ExamplesError, match=message):
        load_scores(tmp_path)
