"""The MASSV config files fit one another."""

import pytest

from configs import massv, massv_distill, massv_phase2


@pytest.mark.parametrize("variant", massv.VARIANTS)
def test_phase_2_learns_what_the_target_answered(variant):
    asked, learned = massv_distill.get_config(variant).data, massv_phase2.get_config(variant).data
    assert learned.source == asked.source
    assert learned.answer_images == asked.source.images
