"""The MASSV config files fit one another."""

import pytest

from configs import massv, massv_distill, massv_eval, massv_phase1, massv_phase2


@pytest.mark.parametrize("variant", massv.VARIANTS)
def test_phase_2_learns_what_the_target_answered(variant):
    asked, learned = massv_distill.get_config(variant).data, massv_phase2.get_config(variant).data
    assert learned.source == asked.source
    assert learned.answer_images == asked.source.images


@pytest.mark.parametrize("variant", [v for v in massv.VARIANTS if not massv.is_mini(v)])
def test_training_leaves_the_evaluation_s_images_out(variant):
    asked = massv_eval.get_config(variant).evaluation.source.path
    for file in (massv_phase1, massv_distill, massv_phase2):
        assert file.get_config(variant).data.exclude == asked
