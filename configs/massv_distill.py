"""The target answers the instructions of mix-665K, for phase 2.

The paper is silent about temperature, length and turns; these are this project's choices [ours]:
half greedy and half at temperature 1, first turns (where seeing matters most), at most 256 tokens,
and the "single word" suffix dropped from half of the questions that have one, since answers of one
word teach next to nothing.
"""

from ml_collections import ConfigDict

from configs import common, massv
from massv_jax.experiment import Experiment


def get_config(variant: str = "") -> ConfigDict:
    name = massv.resolve(variant, "massv_distill")
    config = massv.base(name, "distill")
    massv.use_source(config, massv.MIX_665K)
    if name.startswith("qwen2_5_vl"):
        config.distill.batch_size = 8  # 16 of the largest images do not fit on four v5e chips
    if name == "vlv":
        massv.use_source(config, massv.LCS_558K)  # images; the captioner needs no question
        config.distill.drop_suffix_fraction = 0.0
        config.distill.prompt_lengths = (1,)
    if massv.is_mini(name):
        massv.use_source(config, massv.MINI_QUESTIONS)
        config.distill.update(
            max_new_tokens=64, max_samples=4000, batch_size=32, prompt_lengths=(64, 96)
        )
    return common.complete(config, Experiment)
