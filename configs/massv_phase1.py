"""MASSV phase 1: the projector alone, on image and caption [paper].

Values are LLaVA-1.5's [LLaVA], the paper's own being unknown: LCS-558K once, `plain` format,
learning rate 1e-3 with a cosine to 0, 3 % warm-up, batch 256, no weight decay.
"""

from ml_collections import ConfigDict

from configs import common, massv
from massv_jax.experiment import Experiment


def get_config(variant: str = "") -> ConfigDict:
    name = massv.resolve(variant, "massv_phase1")
    config = massv.base(name, "phase1")
    config.data.format = "plain"
    massv.use_source(config, massv.LCS_558K)
    config.data.batch_size = 256
    massv.use_steps(config, 2180, 1e-3)
    if massv.is_mini(name):
        massv.use_source(config, massv.MINI_CAPTIONS)
        config.data.batch_size = 32
        massv.use_steps(config, 200, 2e-3)
    return common.complete(config, Experiment)
