"""The certificate passes what is lossless and fails what is not."""

import dataclasses
import json

import numpy as np
import pytest

from massv_jax.evaluation.acceptance import Measured
from massv_jax.evaluation.certificate import CERTIFICATE, certify, check_greedy, check_windows
from massv_jax.evaluation.kernel import RULES, check_kernel, chi_square, emitted_counts
from massv_jax.evaluation.prompts import Question
from massv_jax.evaluation.run import Subject
from massv_jax.evaluation.windows import WindowLogits
from massv_jax.speculative.counts import Statistics
from massv_jax.speculative.drafters import LookupDrafter
from tests.massv.evaluation.test_massv_evaluation import decoder, experiment, toy  # noqa: F401
from tests.massv.speculative.toy import ToyDecoder


class Forgetful(ToyDecoder):
    """Places drafts that were refused are not taken back: rows go on behind them."""

    def rewind(self, state, end):
        return state


class Blurred(ToyDecoder):
    """A window's logits are a little off."""

    def extend(self, params, state, tokens):
        logits, state = super().extend(params, state, tokens)
        return logits + 0.1 * (tokens.shape[1] > 1), state


def _certify(experiment, out, target, arms):  # noqa: F811
    settings = dataclasses.replace(experiment.evaluation, kernel_keys=20_000, contexts=3)
    experiment = dataclasses.replace(experiment, task="lossless", evaluation=settings)
    plain = dataclasses.replace(decoder(None), target=target)
    drafted = {name: dataclasses.replace(plain, drafter=d) for name, d in arms.items()}
    passed = certify(Subject(experiment, plain, drafted), out, say=lambda line: None)
    return passed, json.loads((out / CERTIFICATE).read_text())


@pytest.mark.slow
def test_a_certificate(experiment, tmp_path):  # noqa: F811
    arms = {"near": toy(0.3), "lookup": LookupDrafter()}
    passed, content = _certify(experiment, tmp_path, toy(), arms)
    assert passed
    assert content["passed"]
    checks = content["checks"]
    assert set(checks) == {
        "window_logits",
        "greedy.near.gamma3",
        "accept_rule.near",
        "greedy.lookup.gamma3",
    }
    greedy = checks["greedy.near.gamma3"]
    assert (greedy["same"], greedy["answers"]) == (5, 5)
    assert greedy["passes"] < greedy["tokens"]
    assert checks["window_logits"]["places"] == 5 * 12
    assert checks["window_logits"]["largest_relative"] < 1e-5
    rules = checks["accept_rule.near"]["rules"]
    assert rules["rejection"]["least_p_value_corrected"] > 1e-3
    wrong = [name for name in RULES["rejection"] if name != "rejection"]
    assert all(rules[name]["p_value"] < 1e-6 for name in wrong)
    assert len(content["drafters"]["near"]) == 64
    assert content["versions"]["jax"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "check"), [(Forgetful, "greedy.near.gamma3"), (Blurred, "window_logits")]
)
def test_wrong_networks_get_none(experiment, tmp_path, network, check):  # noqa: F811
    target = dataclasses.replace(toy(), decoder=network())
    settings = dataclasses.replace(experiment.evaluation, num_prompts=2)
    experiment = dataclasses.replace(experiment, evaluation=settings)
    passed, content = _certify(experiment, tmp_path, target, {"near": toy(0.3)})
    assert not passed
    assert not content["checks"][check]["passed"]


def test_near_ties_are_no_errors():
    questions = [Question(f"q{i}", "all", (), "") for i in range(3)]
    none = np.zeros((3, 1), int)
    statistics = Statistics(none[:, 0], none[:, 0], none, none)
    plain = Measured(np.array([[1, 2, 3]] * 3), np.full(3, 3), statistics)
    drafted = Measured(np.array([[1, 2, 3], [1, 4, 4], [5, 2, 3]]), np.full(3, 3), statistics)
    values = np.tile(np.array([2.0, 1.99, 0.5]), (3, 3, 1))
    ids = np.tile(np.array([9, 4, 5]), (3, 3, 1))
    small = np.full((3, 3), 0.01)
    windows = WindowLogits(small, small * 500, small > 1, ids, values, np.ones((3, 3), bool))
    made = check_greedy(questions, plain, drafted, windows)
    assert made["same"] == 1
    assert [(t["id"], t["place"]) for t in made["near_ties"]] == [("q1", 1)]
    assert [(t["id"], t["place"]) for t in made["errors"]] == [("q2", 0)]
    assert made["errors"][0]["gap"] == pytest.approx(1.5)
    assert not made["passed"]
    assert check_windows(windows, 0.01)["passed"]
    assert not check_windows(windows, 0.001)["passed"]


def test_a_departure_is_measured_by_the_rounding_of_its_own_place():
    """What rounding does elsewhere excuses nothing."""
    none = np.zeros((1, 1), int)
    statistics = Statistics(none[:, 0], none[:, 0], none, none)
    plain = Measured(np.array([[1, 2, 3]]), np.full(1, 3), statistics)
    drafted = Measured(np.array([[1, 4, 3]]), np.full(1, 3), statistics)
    ids, values = np.tile(np.array([2, 4]), (1, 3, 1)), np.tile(np.array([2.0, 1.5]), (1, 3, 1))

    def made(difference):
        small = np.array([difference])
        windows = WindowLogits(small, small, small > 9, ids, values, np.ones((1, 3), bool))
        return check_greedy([Question("q", "all", (), "")], plain, drafted, windows)

    assert made([0.01, 0.3, 0.01])["passed"]
    assert not made([0.3, 0.01, 0.3])["passed"]


def _contexts(count):
    """Places in which about half of the drafts are kept."""
    rng = np.random.default_rng(0)
    p, noise = (rng.dirichlet(np.full(12, 0.5), count).astype(np.float32) for _ in range(2))
    return list(zip(p, 0.4 * p + 0.6 * noise, strict=True))


@pytest.mark.parametrize("accept", RULES)
def test_the_kernel_is_tested_and_the_test_is_tested(accept):
    contexts = _contexts(3)
    made = check_kernel(contexts, accept=accept, keys=6_000, seed=0)
    assert made["passed"], made
    counts = emitted_counts(accept, accept, contexts, keys=3000, seed=1)
    assert counts[0].sum() == 3000
    assert 3000 > counts[1].sum() > counts[2].sum() > 300


def test_wrong_in_later_places_only_is_found():
    contexts = _contexts(3)
    for accept, rule in (("rejection", "first_place_only"), ("coupled", "one_noise")):
        counts = emitted_counts(accept, rule, contexts, keys=6_000, seed=0)
        first, second, _ = (
            chi_square(c, p) for c, (p, _) in zip(counts, contexts, strict=True)
        )  # fmt: skip
        assert first.p_value > 1e-3
        assert second.p_value < 1e-6


def test_contexts_that_show_nothing_give_no_certificate():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(12, 0.5)).astype(np.float32)
    # Equal distributions leave wrong rules nothing to be wrong about.
    same = check_kernel([(p, p)], accept="rejection", keys=6_000, seed=0)
    assert not same["passed"]
    assert same["rules"]["rejection"]["as_it_must"]
    none = check_kernel([], accept="rejection", keys=6_000, seed=0)
    assert not none["passed"]
    assert "longer answers" in none["reason"]
    impossible = np.zeros(12)
    impossible[0] = 1.0
    assert chi_square(np.ones(12), impossible).p_value == 0
    many = rng.dirichlet(np.full(120, 0.3))
    assert chi_square(rng.multinomial(3000, many), many).freedom <= 50
