"""`vlv_jax.evaluate` on tiny random networks: what is written, and that conditions differ."""

import dataclasses
import json
import shutil
import types

import numpy as np
import pytest

from core_jax.config import ConfigError, to_dataclass
from core_jax.evaluation.bootstrap import bootstrap_difference
from core_jax.evaluation.report import Report
from core_jax.train.workdir import save_experiment
from vlv_jax import workdir
from vlv_jax.batches import views_of
from vlv_jax.evaluation import run
from vlv_jax.evaluation.answering import LanguageModelAnswerer, questions_of
from vlv_jax.evaluation.captions import CaptionRecord, score_note, verdict
from vlv_jax.evaluation.denoising import compare_conditions, encode_examples, stratum_draws
from vlv_jax.evaluation.examples import load_scores, measure
from vlv_jax.evaluation.heldout import Subject, heldout_batches, true_captions
from vlv_jax.evaluation.reconstruction import add_frechet, feature_distances, pixel_mse
from vlv_jax.evaluation.run import Request, evaluate, load_subject
from vlv_jax.evaluation.vqa import PromptFormat
from vlv_jax.experiment import Experiment
from vlv_jax.inference import Autoencoder, Caption, Captioner
from vlv_jax.loading import load_networks
from vlv_jax.model_card import metrics_of
from vlv_jax.workdir import WorkdirError, experiment_to_use

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
    assert "from another image" in page
    assert "class='chip" in page  # the scorer's verdict
    records = [json.loads(x) for x in (out / "evaluated_captions.jsonl").read_text().splitlines()]
    assert len(records) == 6
    assert {"id", "text", "finished", "num_tokens", "references", "scores"} <= set(records[0])
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


def test_saved_scores_give_the_numbers_of_the_report(written):
    out, report, _ = written
    scores = load_scores(out)
    checked = 0
    for name, entry in metrics_of(report["vlv"]):
        if "frechet" in name:
            continue
        found = measure(scores, name)
        assert len(found.ids) == entry["n"]
        value = found.statistic(found.rows.sum(axis=0))
        assert value == pytest.approx(entry["value"], rel=1e-5, abs=1e-9), name
        checked += 1
    assert checked > 50


def test_a_stage1_run_is_measured_without_captions(subject, tmp_path):
    alone = dataclasses.replace(
        subject, captioner=None, experiment=dataclasses.replace(subject.experiment, stage=1)
    )
    lines: list[str] = []
    evaluate(alone, tmp_path, Request(), provenance={}, say=lines.append)
    report = json.loads((tmp_path / "report.json").read_text())["vlv"]
    assert report.keys() == {"stage1", "reconstruction"}
    # The paths that readers of report.json rely on.
    for condition in ("vlv", "caption", "none", "wrong_image"):
        assert report["stage1"]["denoising_loss"][condition]["n"] == 6
        assert report["reconstruction"]["pixel_mse"][condition]["n"] == 3
        assert report["reconstruction"]["davit_cosine"][condition]["n"] == 3
    differences = report["stage1"]["denoising_loss_difference"]
    for pair in ("caption_minus_none", "none_minus_wrong_image", "vlv_minus_caption"):
        low, high = differences[pair]["interval"]
        assert low <= differences[pair]["value"] <= high
        assert "excludes_zero" in differences[pair]["settings"]
    assert sum("stage-1" in line for line in lines) == 1
    assert not (tmp_path / "evaluated_captions.jsonl").exists()


def test_both_stages_share_a_report(written, subject, tmp_path):
    out, _, _ = written
    shutil.copytree(out, tmp_path / "both")
    alone = dataclasses.replace(
        subject, captioner=None, experiment=dataclasses.replace(subject.experiment, stage=1)
    )
    request = Request(parts=("denoising",))
    evaluate(alone, tmp_path / "both", request, provenance={}, say=lambda line: None)
    report = json.loads((tmp_path / "both" / "report.json").read_text())["vlv"]
    assert {"stage1", "stage2", "caption", "reconstruction"} <= report.keys()


def test_only_what_is_asked_is_computed(subject, tmp_path, monkeypatch):
    called: list[str] = []

    def record_call(name):
        monkeypatch.setattr(run, name, lambda *a, **k: called.append(name) or [])

    for name in ("write_captions", "report_captions", "redraw_examples",
                 "report_reconstruction", "report_denoising", "report_questions"):  # fmt: skip
        record_call(name)
    expected = {
        "captions": {"write_captions", "report_captions"},
        "reconstruction": {"redraw_examples", "report_reconstruction"},
        "denoising": {"report_denoising"},
        # Questions are answered from captions; those are written, but not reported.
        "vqa": {"write_captions", "report_questions"},
    }
    for part, names in expected.items():
        called.clear()
        request = Request(parts=(part,), answerer="x")
        evaluate(subject, tmp_path / part, request, provenance={}, say=lambda line: None)
        assert set(called) == names


def test_held_out_images_have_to_be_named(tiny_hub, tmp_path):
    """The full-size configs cannot know them."""
    given = make_experiment(tiny_hub, source={"kind": "auto"})
    with pytest.raises(WorkdirError, match=r"--config\.evaluation\.source\.path"):
        load_subject(tmp_path, given)
    with pytest.raises(WorkdirError, match="not a working directory"):  # the control
        load_subject(tmp_path, make_experiment(tiny_hub))


def test_only_networks_that_are_needed_are_loaded(tiny_hub, tmp_path, monkeypatch):
    given = make_experiment(tiny_hub)
    save_experiment(tmp_path, given)
    monkeypatch.setattr(workdir, "own_params", lambda *a, **k: {})
    found = load_subject(tmp_path, given, ("captions",))
    assert found.captioner is not None
    assert found.autoencoder.networks.unet is None
    found = load_subject(tmp_path, given, ("denoising",))
    assert found.captioner is None
    assert found.autoencoder.networks.language_model is None
    assert found.autoencoder.networks.unet is not None


def test_a_stage1_workdir_is_known_whatever_config_is_given(tiny_hub, tmp_path, monkeypatch):
    given = make_experiment(tiny_hub)
    own = dataclasses.replace(
        given, stage=1, model=dataclasses.replace(given.model, language_model="")
    )
    save_experiment(tmp_path, own)
    monkeypatch.setattr(workdir, "own_params", lambda *a, **k: {})
    found = load_subject(tmp_path, given)
    assert found.captioner is None
    assert found.experiment.stage == 1
    assert found.evaluation == given.evaluation
    with pytest.raises(WorkdirError, match="stage-1 run"):
        load_subject(tmp_path, given, ("captions",))


def test_the_stage_of_an_export_is_its_own(tiny_hub, tmp_path, monkeypatch):
    given = make_experiment(tiny_hub)
    loaded = types.SimpleNamespace(sampling=None)
    monkeypatch.setattr(run, "is_export", lambda path: True)
    used = []
    monkeypatch.setattr(
        run, "load_pair", lambda path, experiment: used.append(experiment) or (loaded, None)
    )
    for language_model, stage in (("", 1), ("somewhere", 2)):
        model = dataclasses.replace(given.model, language_model=language_model)
        monkeypatch.setattr(run, "exported_model", lambda path, config, model=model: model)
        found = load_subject(tmp_path, given)
        assert found.experiment.stage == stage
        assert found.experiment.model == model
        assert loaded.sampling == given.sampling
        assert used.pop() == found.experiment  # the config's precision, execution and limits


def test_what_is_misspelt_is_named(tiny_hub, subject, tmp_path):
    with pytest.raises(ConfigError, match=r"num_caption is unknown; did you mean .*num_captions"):
        make_experiment(tiny_hub, num_caption=3)
    with pytest.raises(ConfigError, match=r"evaluation\.seed must be int"):
        make_experiment(tiny_hub, seed="x")
    with pytest.raises(ValueError, match="'caption'; did you mean 'captions'"):
        Request(parts=("caption",))
    with pytest.raises(ValueError, match="at least one part"):
        Request(parts=())
    wrong = dataclasses.replace(
        subject, experiment=make_experiment(tiny_hub, scorer="miniature.world.scoring:scores")
    )
    with pytest.raises(WorkdirError, match=r"evaluation\.scorer: .*has no 'scores'"):
        evaluate(wrong, tmp_path, Request(), provenance={})


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
    assert score_note(row) == "object: 2 of 3 wrong, 1 missed"
    assert verdict(row) == {"object 1 of 3": False}
    assert verdict({f"colour.{k}": 2 for k in ("tp_pred", "pred", "tp_ref", "ref")}) == {
        "colour 2 of 2": True
    }
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
