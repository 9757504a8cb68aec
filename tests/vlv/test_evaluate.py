"""`vlv_jax.evaluate` on tiny random networks: what is written, and that conditions differ."""

import dataclasses
import json

import numpy as np
import pytest

from core_jax.config import to_dataclass
from vlv_jax.batches import views_of
from vlv_jax.evaluation.answering import LanguageModelAnswerer, questions_of
from vlv_jax.evaluation.bootstrap import bootstrap_difference
from vlv_jax.evaluation.captions import CaptionRecord, score_notes
from vlv_jax.evaluation.denoising import compare_conditions, encode_examples, stratum_draws
from vlv_jax.evaluation.heldout import Subject, heldout_batches, true_captions
from vlv_jax.evaluation.reconstruction import add_frechet, feature_distances, pixel_mse
from vlv_jax.evaluation.report import Report
from vlv_jax.evaluation.run import Request, evaluate, load_subject
from vlv_jax.evaluation.vqa import PromptFormat
from vlv_jax.experiment import Experiment
from vlv_jax.inference import Autoencoder, Caption, Captioner
from vlv_jax.loading import load_networks
from vlv_jax.workdir import WorkdirError, experiment_to_use, save_experiment

EVALUATION = {
    "num_captions": 6, "num_redrawn": 3, "num_denoising": 6, "timesteps_per_image": 2,
    "scorer": "miniature.world.scoring:scorer", "reference_key": "scene",
    "bootstrap_samples": 50,
}  # fmt: skip


def make_experiment(tiny_hub, **evaluation) -> Experiment:
    source = {"kind": "folder", "path": tiny_hub.images,
              "manifest": f"{tiny_hub.images}/captions.jsonl"}  # fmt: skip
    content = tiny_hub.experiment(stage=2)
    content["evaluation"] = EVALUATION | {"source": source} | evaluation
    return to_dataclass(Experiment, content)


@pytest.fixture(scope="module")
def subject(tiny_hub) -> Subject:
    """Untrained: nothing here depends on what was learned."""
    experiment = make_experiment(tiny_hub)
    networks, params, pieces = load_networks(experiment.model)
    fields = (
        networks, params, pieces, views_of(experiment.data, pieces.processor),
        experiment.sampling, experiment.data.limits,
    )  # fmt: skip
    return Subject(Autoencoder(*fields), Captioner(*fields), experiment)


@pytest.fixture(scope="module")
def written(subject, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    lines: list[str] = []
    evaluate(subject, out, Request(), provenance={"versions": "x"}, say=lines.append)
    return out, json.loads((out / "report.json").read_text()), lines


def test_the_report_has_every_number_with_its_circumstances(written):
    _, report, _ = written
    vlv = report["vlv"]
    for name in ("bleu_1", "bleu_4", "rouge_l", "cider_d", "object_f1", "relation_f1",
                 "finished", "tokens"):  # fmt: skip
        entry = vlv["caption"][name]
        assert entry["n"] == 6
        assert entry["settings"]["sampling.num_beams"] == 1
        low, high = entry["interval"]
        assert low <= entry["value"] <= high
    for distance in ("pixel_mse", "davit_cosine", "davit_l2"):
        values = vlv["reconstruction"][distance]
        assert set(values) == {"vlv", "caption", "none", "wrong_image"}
        assert all(v["n"] == 3 and v["seed"] == 0 for v in values.values())
    losses = vlv["stage2"]["denoising_loss"]
    assert all(losses[c]["value"] > 0 for c in ("vlv", "caption", "none", "wrong_image"))
    difference = vlv["stage2"]["denoising_loss_difference"]["caption_minus_none"]
    expected = losses["caption"]["value"] - losses["none"]["value"]
    assert difference["value"] == pytest.approx(expected, abs=1e-9)
    low, high = difference["interval"]
    assert difference["settings"]["excludes_zero"] == (low > 0 or high < 0)


def test_the_page_shows_the_pictures_and_what_was_left_out_is_said(written):
    out, _, lines = written
    page = (out / "report.html").read_text()
    assert page.count("<img") == 3 * 5  # original and four conditions
    assert "wrong_image" in page
    records = [json.loads(x) for x in (out / "evaluated_captions.jsonl").read_text().splitlines()]
    assert len(records) == 6
    assert {"id", "text", "finished", "num_tokens", "references"} <= set(records[0])
    assert any("--answerer" in line for line in lines)


def test_same_noise_for_every_condition_and_batch_size(subject):
    encoded = encode_examples(subject, 6)
    losses = compare_conditions(subject, encoded)
    # 'none' does not depend on z at all, so two models compared get the same number.
    other = compare_conditions(subject, encoded | {"z": -encoded["z"]})
    np.testing.assert_array_equal(losses["none"], other["none"])
    assert np.abs(losses["vlv"] - other["vlv"]).max() > 1e-6
    same = compare_conditions(subject, encoded | {"z": np.repeat(encoded["z"][:1], 6, axis=0)})
    np.testing.assert_allclose(same["vlv"], same["wrong_image"], rtol=1e-6)
    auto = subject.autoencoder
    sampling = dataclasses.replace(auto.sampling, batch_size=3)
    small = dataclasses.replace(subject, autoencoder=dataclasses.replace(auto, sampling=sampling))
    np.testing.assert_allclose(compare_conditions(small, encoded)["vlv"], losses["vlv"], rtol=1e-5)


def test_timesteps_fill_their_strata(subject):
    import jax
    import jax.numpy as jnp

    networks = subject.autoencoder.networks
    moments = jnp.zeros((64, 2, 2, 1))
    steps = networks.schedule.num_train_timesteps
    for stratum in range(4):
        _, timesteps, noise = stratum_draws(
            networks, jax.random.key(0), jnp.arange(64), moments, moments, jnp.int32(stratum), 4
        )
        t = np.asarray(timesteps)
        assert t.min() >= stratum * steps // 4
        assert t.max() < (stratum + 1) * steps // 4
        assert len(np.unique(t)) > 16
    assert np.std(np.asarray(noise), axis=0).min() > 0.5  # every image its own noise


def test_heldout_batches_keep_order_and_shape(subject):
    batches = list(heldout_batches(subject, 5))
    assert [len(b["ids"]) for b in batches] == [4, 4]
    assert [int(b["mask"].sum()) for b in batches] == [4, 1]
    ids = [i for b in batches for i, m in zip(b["ids"], b["mask"], strict=True) if m]
    assert ids == sorted(ids)
    assert batches[0]["caption"][0]
    assert "scene" in batches[0]["extras"][0]


def test_a_stage1_run_is_measured_without_captions(subject, tmp_path):
    alone = dataclasses.replace(
        subject, captioner=None, experiment=dataclasses.replace(subject.experiment, stage=1)
    )
    lines: list[str] = []
    request = Request(parts=("captions", "denoising"), section="vlv.small")
    evaluate(alone, tmp_path, request, provenance={}, say=lines.append)
    report = json.loads((tmp_path / "report.json").read_text())
    assert "caption" not in report["vlv"]["small"]
    assert report["vlv"]["small"]["stage1"]["denoising_loss"]["vlv"]["n"] == 6
    assert any("stage-1" in line for line in lines)


def test_distances():
    images = np.zeros((2, 4, 4, 3), np.uint8)
    other = images.copy()
    other[1] = 255
    np.testing.assert_allclose(pixel_mse(other, images), [0.0, 1.0])
    a = np.zeros((2, 3, 4), np.float32)
    a[..., 0] = 1.0
    b = a.copy()
    b[1] = np.roll(a[1], 1, axis=-1)
    found = feature_distances(b, a)
    np.testing.assert_allclose(found["davit_cosine"], [0.0, 1.0], atol=1e-6)
    np.testing.assert_allclose(found["davit_l2"], [0.0, np.sqrt(0.5)], atol=1e-6)


def test_frechet_distance_is_named_by_its_features(subject):
    rng = np.random.default_rng(0)
    features = {"original": rng.normal(size=(40, 3, 4)), "vlv": rng.normal(size=(40, 3, 4)) + 1.0}
    report = Report("x")
    assert add_frechet(report, "vlv", subject, features, {}) == []
    few = {name: x[:5] for name, x in features.items()}
    assert "means little" in add_frechet(Report("x"), "vlv", subject, few, {})[0]


def test_notes_and_references():
    row = {"object.tp_pred": 1, "object.pred": 3, "object.tp_ref": 1, "object.ref": 2}
    assert score_notes([row]) == ["object: 2 of 3 wrong, 1 missed"]
    assert true_captions("a", {"captions": ["a", "b", ""]}) == ("a", "b")
    assert true_captions("", {}) == ()
    assert CaptionRecord.__dataclass_fields__.keys() == {"id", "caption", "references", "extras"}
    paired = bootstrap_difference([1.0, 2.0], [1.0, 2.0])
    assert not paired.excludes_zero


def test_a_run_keeps_what_it_is_and_takes_how_it_is_used(tiny_hub, tmp_path):
    given = make_experiment(tiny_hub)
    own = dataclasses.replace(
        given, model=dataclasses.replace(given.model, num_queries=5, florence2="gone"),
        evaluation=None, sampling=dataclasses.replace(given.sampling, num_steps=9),
    )  # fmt: skip
    save_experiment(tmp_path, own)
    used = experiment_to_use(tmp_path, given)
    assert used.model.num_queries == 5
    assert used.model.florence2 == given.model.florence2  # moved
    assert used.sampling == given.sampling
    assert used.evaluation == given.evaluation
    with pytest.raises(WorkdirError, match="evaluation"):
        load_subject(tmp_path, own)


def record(name: str, **extras) -> CaptionRecord:
    return CaptionRecord(name, Caption("a red dot", True, 4), ("a red dot",), extras)


def test_questions_in_both_forms():
    lists = record("a", questions=["q?", "r?"], answers=["red", "two"], kinds=["x", "y"])
    asked = [{"question": "q?", "answer": "red", "kind": "x"},
             {"question": "r?", "answers": ["two"], "kind": "y"}]  # fmt: skip
    objects = record("a", questions=asked)
    assert questions_of(lists) == questions_of(objects)
    assert questions_of(lists)[1].answers == ("two",)
    assert questions_of(record("b")) == []
    with pytest.raises(ValueError, match="2 questions, 1 answers"):
        questions_of(record("a", questions=["q?", "r?"], answers=["red"]))


def test_answers_do_not_depend_on_their_neighbours(tiny_hub):
    alone = LanguageModelAnswerer.from_pretrained(
        tiny_hub.language_model, batch_size=3, max_new_tokens=4
    )
    prompts = [PromptFormat(instruction="").prompt(c, "What colour?") for c in
               ("A red disc.", "A large blue square at the top, a small star.", "")]  # fmt: skip
    together = alone([*prompts, prompts[0]])
    assert together[0] == together[3]
    assert [alone([p])[0] for p in prompts] == together[:3]
    assert len(set(together)) > 1
    with pytest.raises(WorkdirError, match="causal"):
        LanguageModelAnswerer.from_pretrained(f"{tiny_hub.diffusion}/vae")


def test_questions_are_reported_with_ceiling_and_floor(subject, tiny_hub, tmp_path):
    request = Request(parts=("captions", "vqa"), answerer=tiny_hub.language_model)
    evaluate(subject, tmp_path, request, provenance={}, say=lambda line: None)
    vqa = json.loads((tmp_path / "report.json").read_text())["vlv"]["vqa"]
    assert set(vqa["accuracy"]) == {"vlv", "true_caption", "no_caption"}
    assert vqa["accuracy"]["vlv"]["n"] == 6
    assert vqa["accuracy"]["vlv"]["settings"]["questions"] > 6
    assert "vlv_minus_true_caption" in vqa["accuracy_difference"]
    assert "Answer:" in vqa["accuracy"]["vlv"]["settings"]["prompt"]
