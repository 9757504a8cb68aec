"""Wall-clock: who answers when, and what is made of the seconds."""

import numpy as np
import pytest

from core_jax.evaluation.report import Report, stored_metrics
from massv_jax.evaluation.prompts import Question
from massv_jax.evaluation.reporting import Place
from massv_jax.evaluation.run import PLAIN_ARM
from massv_jax.evaluation.speed import Timed, report_speed, time_answers
from massv_jax.experiment import DecodingConfig
from massv_jax.speculative.profile import Profile
from tests.massv.evaluation.test_massv_evaluation import decoder, toy

DECODING = DecodingConfig(gamma=3, max_new_tokens=12, batch_size=4, prompt_lengths=(16,))


def test_every_entry_answers_every_question():
    prompt = [{"role": "user", "content": [{"type": "text", "text": "abc"}]}]
    questions = [Question(f"q{i}", "all", (), prompt) for i in range(2)]
    entries = {(PLAIN_ARM, 0): decoder(None), ("same", 3): decoder(toy())}
    found = time_answers(entries, questions, DECODING, temperature=0.0, repeats=1)
    assert list(found) == list(entries)
    for timed in found.values():
        assert timed.tokens.tolist() == [12, 12]
        assert timed.begin.shape == timed.rounds.shape == (2,)
        assert (timed.begin > 0).all()
        assert (timed.rounds > 0).all()
    # The first token is the prompt's; a drafter that is the target is right three times a pass.
    assert found[PLAIN_ARM, 0].passes.tolist() == [11, 11]
    assert found["same", 3].passes.tolist() == [3, 3]


def test_quotients_are_of_tokens_a_second(tmp_path):
    def timed(begin, rounds, passes):
        return Timed(np.full(4, begin), np.full(4, rounds), np.full(4, 10), np.full(4, passes))

    report = Report("t")
    report.begin_group("speed")
    place = Place(report, "massv", {"seed": 0, "num_resamples": 20}, {})
    found = {
        (PLAIN_ARM, 0): timed(1.0, 4.0, 9), ("text", 5): timed(1.0, 2.0, 4),
        ("massv", 5): timed(1.0, 1.0, 3),
    }  # fmt: skip
    costs = Profile(
        gamma=5, vision=0.1, target_prefill=0.1, drafter_prefill=0.1, draft=0.1, verify=0.2,
        round=0.33, step=0.1,
    )  # fmt: skip
    report_speed(place, "all", 0.0, found, dict.fromkeys([("text", 5), ("massv", 5)], costs))
    report.write(tmp_path)
    metrics = {m.name: m.entry["value"] for m in stored_metrics(tmp_path)}
    at = "speed.all.t0.gamma5.massv"
    assert metrics["speed.all.t0.gamma0.plain.tokens_per_second"] == pytest.approx(2.0)
    assert metrics[f"{at}.times_plain_end_to_end"] == pytest.approx(2.5)
    assert metrics[f"{at}.times_plain_decode"] == pytest.approx(4.0)
    assert metrics[f"{at}.times_text_end_to_end"] == pytest.approx(1.5)
    # Nine steps of 0.1 s against three rounds of 0.3 s; a second before either.
    assert metrics[f"{at}.predicted_times_plain_decode"] == pytest.approx(1.0)
    assert metrics[f"{at}.predicted_times_plain_end_to_end"] == pytest.approx(1.0)
    assert metrics["speed.all.t0.gamma5.text.predicted_times_plain_end_to_end"] == pytest.approx(
        1.9 / 2.2
    )
    assert metrics[f"{at}.costs.overhead"] == pytest.approx(0.1)

