import dataclasses

import pytest

from miniature.results.plan import BUDGETS, COMPARISONS, SEEDS, runs

PLANNED = {run.name: run for run in runs(BUDGETS["full"])}


def test_runs_come_after_the_ones_they_start_from():
    seen = set()
    for run in runs(BUDGETS["smoke"]):
        assert run.name not in seen
        assert not run.after or run.after in seen
        assert run.steps >= 1
        seen.add(run.name)


def test_the_headline_has_three_seeds_of_both_stages():
    for stage in (1, 2):
        named = [PLANNED[f"stage{stage}-{seed}"] for seed in SEEDS]
        assert sorted({run.seed for run in named}) == list(SEEDS)
        assert {run.stage for run in named} == {stage}
        assert len({run.steps for run in named}) == 1


@pytest.mark.parametrize("comparison", COMPARISONS, ids=lambda c: c.section)
def test_what_is_compared_is_run(comparison):
    names = [name for arm in comparison.arms.values() for name in arm]
    assert set(names) <= set(PLANNED)
    assert not comparison.baseline or comparison.baseline in comparison.arms
    assert len({PLANNED[name].stage for name in names}) == 1


def test_ablations_differ_in_one_thing_only():
    """Arms of a comparison share their budget, but for the number of images seen."""
    for comparison in COMPARISONS:
        if not comparison.baseline:
            continue
        arms = [PLANNED[name] for names in comparison.arms.values() for name in names]
        differing = {
            field.name
            for field in dataclasses.fields(arms[0])
            if field.name != "name" and len({repr(getattr(arm, field.name)) for arm in arms}) > 1
        }
        allowed = {
            "T5a_images": {"steps"}, "T5b_language_model": {"variant"},
            "T7_paper": {"after"}, "T7_fair": {"after", "values"},
        }  # fmt: skip
        assert differing <= allowed.get(comparison.section.rsplit(".", 1)[-1], {"values"})
