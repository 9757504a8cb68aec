"""An evaluation of toy drafters: what must come out is known for a drafter that is the target."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from core_jax.data.images import ImageLimits
from core_jax.data.sources import SourceSpec
from massv_jax.evaluation.acceptance import measure
from massv_jax.evaluation.forced import compare_on_answers
from massv_jax.evaluation.looking import look
from massv_jax.evaluation.prompts import EvaluationError, open_questions
from massv_jax.evaluation.run import RECORDS, Subject, evaluate, parse_arms
from massv_jax.experiment import (
    DataConfig,
    DecodingConfig,
    EvaluationConfig,
    Experiment,
    ModelConfig,
)
from massv_jax.speculative.decoder import SpeculativeDecoder
from massv_jax.speculative.drafters import LookupDrafter
from tests.massv.speculative.test_decoder import target
from tests.massv.test_distilling import ChatFrontend

DECODING = DecodingConfig(
    gamma=3, max_new_tokens=12, batch_size=4, prompt_lengths=(8, 16), temperature=0.0
)


def toy(apart=0.0):
    return dataclasses.replace(target(apart=apart), frontend=ChatFrontend())


def decoder(drafter):
    return SpeculativeDecoder(toy(), drafter, batch_size=4, prompt_lengths=(8, 16))


@pytest.fixture
def experiment(tmp_path):
    rng = np.random.default_rng(0)
    records = []
    for i in range(6):
        pixels = rng.integers(0, 256, (12, 8, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        ask = [{"from": "human", "value": f"<image>\nab{'cdefgh'[i]}"}]
        task = "descriptions" if i < 4 else "questions"
        records.append({"id": f"e{i}", "image": f"{i}.png", "conversations": ask, "task": task})
    records.append({"id": "gone", "image": "no.png", "conversations": ask, "task": "questions"})
    (tmp_path / "held.json").write_text(json.dumps(records))
    path = str(tmp_path / "held.json")
    settings = EvaluationConfig(
        source=SourceSpec(kind="llava", path=path, images=str(tmp_path)), gammas=(3,),
        min_answer_tokens=5, bootstrap_samples=50, num_prompts=3,
    )  # fmt: skip
    return Experiment(
        task="eval", model=ModelConfig(target="t", language_model="l", frozen_dtype="float32"),
        data=DataConfig(limits=ImageLimits(min_side=1)), decoding=DECODING, evaluation=settings,
    )  # fmt: skip


@pytest.mark.parametrize("temperatures", [(0.0,), pytest.param((0.0, 1.0), marks=pytest.mark.slow)])
def test_a_whole_report(experiment, tmp_path, temperatures):
    settings = dataclasses.replace(experiment.evaluation, temperatures=temperatures)
    experiment = dataclasses.replace(experiment, evaluation=settings)
    arms = {"text": decoder(toy(1.0)), "same": decoder(toy()), "lookup": decoder(LookupDrafter())}
    said = []
    evaluate(Subject(experiment, decoder(None), arms), tmp_path / "out", say=said.append)
    assert any("gone" in line for line in said)
    report = json.loads((tmp_path / "out" / "report.json").read_text())["massv"]
    for task, count in (("descriptions", 3), ("questions", 2)):
        for t in (f"t{x:g}" for x in temperatures):
            same = report[task][t]["gamma3"]["same"]
            # 11 tokens after the first: windows of 4, 4 and 3 (of which 2 can be drafted).
            assert same["accepted_length"]["value"] == pytest.approx(8 / 3)
            assert same["emitted_length"]["value"] == pytest.approx(11 / 3)
            assert same["acceptance"]["place3"]["value"] == 1
            assert same["times_text"]["value"] > 1
            assert report[task][t]["forced"]["same"]["all"]["tvd"]["value"] < 1e-6
            assert report[task][t]["forced"]["same"]["all"]["top1_agreement"]["value"] == 1
            assert report[task][t]["forced"]["text"]["all"]["tvd"]["value"] > 0.1
            assert "lookup" not in report[task][t]["forced"]
        for arm in arms:
            found = report[task]["t0"]["gamma3"][arm]["identical_to_plain"]
            assert (found["value"], found["n"]) == (1, count)
    looked = report["look"]["t0"]["gamma3"]
    assert "lookup" not in looked
    assert looked["same"]["true"]["accepted_length"]["value"] == pytest.approx(8 / 3)
    for shown in ("blank", "other", "none"):
        assert looked["same"][f"true_minus_{shown}"]["value"] > 0
    lines = (tmp_path / "out" / RECORDS).read_text().splitlines()
    assert len(lines) == 5 * 3 * len(temperatures)
    for line in map(json.loads, lines):  # a token of 12 is the prompt's
        distance = report[line["task"]]["t0"]["forced"].get(line["arm"])
        assert ("places" in line) == (line["arm"] != "lookup")
        assert line.get("places", 11) == 11
        if distance and line["temperature"] == 0:
            assert line["distance"] / 11 == pytest.approx(distance["all"]["tvd"]["value"], abs=0.3)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Does the drafter look?" in page
    assert "Answers: descriptions, temperature 0" in page
    # Twelve tokens, the first of which is the prompt's; three rounds where drafts are always right.
    assert "✓ 11 passes alone" in page
    assert "✓ 3 passes with same, gamma 3: the same words" in page


def test_questions_that_do_not_fit_are_left_out_and_counted(experiment, tmp_path):
    file = tmp_path / "held.json"
    records = json.loads(file.read_text())
    records[1]["conversations"][0]["value"] = "<image>\n" + "a" * 30
    file.write_text(json.dumps(records))
    plain, left_out = open_questions(experiment, images_only=False, decoder=decoder(None))
    assert [q.id for q in plain] == ["e0", "e2", "e3", "e4", "e5"]  # three of each task, if there
    assert "longer than the cache" in left_out["e1"]
    assert "e1" in {q.id for q in open_questions(experiment, images_only=False)[0]}


def test_what_is_shown_changes_acceptance_and_not_the_answer(experiment):
    questions, _ = open_questions(experiment, images_only=False)
    who = decoder(toy(0.3))
    options = dict(temperature=0.0, gamma=3)
    plain = measure(who, questions, DECODING, **options)
    found = look(who, questions, DECODING, batch_size=4, **options)
    assert list(found) == ["true", "blank", "other", "none"]
    for measured in found.values():
        assert measured.same_as(plain).all()
    np.testing.assert_array_equal(found["true"].statistics.accepted, plain.statistics.accepted)
    sums = {k: m.sums()[:, 0].sum() for k, m in found.items()}
    assert sums["true"] > max(sums["other"], sums["none"])


def test_the_first_place_is_accepted_as_often_as_the_distributions_overlap(experiment):
    """The check of the whole chain: loop and teacher forcing see the same q."""
    questions, _ = open_questions(experiment, images_only=False)
    who = decoder(toy(0.3))
    many = questions * 40
    answers = measure(decoder(None), many, DECODING, temperature=1.0, gamma=0)
    forced = compare_on_answers(who, many, answers, DECODING, temperature=1.0, batch_size=100)
    assert forced is not None
    drafted = measure(who, many, DECODING, temperature=1.0, gamma=1)
    s = drafted.statistics.total
    overlap = forced.overlap[:, 1:-1].mean()  # the last place is never drafted
    n = s.judged[0, 0]
    assert n > 1000
    # A window of one stands in every place but those that follow an accepted draft.
    assert abs(s.acceptance[0, 0] - overlap) < 4 * (overlap * (1 - overlap) / n) ** 0.5 + 0.02
    assert 0.2 < overlap < 0.9
    shares, edges = forced.histogram()
    assert shares.sum() == pytest.approx(1)
    assert len(edges) == 21


def test_arms_that_are_none():
    model = ModelConfig(target="t", language_model="l", drafter="runs/x")
    experiment = Experiment(task="eval", model=model)
    assert parse_arms([], experiment) == {"text": "text", "massv": "runs/x"}
    assert parse_arms(["a=d/e", "lookup"], experiment) == {"a": "d/e", "lookup": "lookup"}
    for wrong in (["x"], ["a=b", "a=c"], ["a.b=c"], ["=x"]):
        with pytest.raises(EvaluationError):
            parse_arms(wrong, experiment)
