import dataclasses

import pytest

from configs import massv_phase2
from core_jax.config import to_dataclass
from massv_jax.experiment import Experiment
from miniature.results.massv_plan import (
    ANSWERS,
    COMPARISONS,
    FAMILIES,
    SEEDS,
    Training,
    trainings,
)

PLANNED = {planned.name: planned for planned in trainings()}
MEASURED = {name for name, planned in PLANNED.items() if planned.phase == 2} | {"text"}


def test_drafters_come_after_the_ones_they_start_from():
    seen = set()
    folders = {answers.name for answers in ANSWERS} | {""}
    for planned in trainings():
        assert planned.name not in seen
        assert not planned.after or planned.after in seen
        assert planned.answers in folders
        seen.add(planned.name)


@pytest.mark.parametrize("comparison", COMPARISONS, ids=lambda c: c.section)
def test_what_is_compared_is_measured(comparison):
    names = [name for runs in comparison.arms.values() for name in runs]
    assert set(names) <= MEASURED
    assert len(set(names)) == len(names)
    assert comparison.baseline in comparison.arms


def test_the_headline_has_three_seeds_of_what_is_trained():
    headline = COMPARISONS[0]
    for name, runs in headline.arms.items():
        if name == "text":
            continue
        assert sorted(PLANNED[run].seed for run in runs) == list(SEEDS)
        alike = [dataclasses.replace(PLANNED[run], name="", seed=0, after="") for run in runs]
        assert alike[0] == alike[1] == alike[2]


@pytest.mark.parametrize("variant", FAMILIES.values())
@pytest.mark.parametrize("planned", trainings(), ids=lambda t: t.name)
def test_values_are_of_the_config(planned: Training, variant):
    config = massv_phase2.get_config(variant)
    with config.unlocked():
        for name, value in planned.values.items():
            *path, last = name.split(".")
            at = config
            for key in path:
                at = at[key]
            assert last in at, name
            at[last] = value
    assert to_dataclass(Experiment, config).task == "phase2"
