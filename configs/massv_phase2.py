"""MASSV phase 2 (SDViT): projector and language model, on the target's own answers [paper].

Values are LLaVA-1.5's second stage [LLaVA], the paper's own being unknown: learning rate 2e-5 with
a cosine to 0, 3 % warm-up, batch 128, one epoch of mix-665K. `data.answers` is what
`python -m massv_jax.distill` wrote; without it (`--config.data.answers=''`) the data set's own
answers are learned, which is the arm without self-distillation.
"""

from ml_collections import ConfigDict

from configs import common, massv
from massv_jax.experiment import Experiment


def get_config(variant: str = "") -> ConfigDict:
    name = massv.resolve(variant, "massv_phase2")
    config = massv.base(name, "phase2")
    files = massv.LCS_558K if name == "vlv" else massv.MIX_665K  # what the target answered
    massv.use_source(config, files)
    config.data.answers, config.data.answer_images = "runs/massv_distill", files[1]
    config.data.turns = "all"
    config.run.init_from = "runs/massv_phase1"
    massv.use_steps(config, 5200, 2e-5)
    if name == "vlv":
        config.data.format = "chat"  # answers are; what is learned is the caption alone
    if massv.is_mini(name):
        folder = massv.MINI_RUNS[name]
        massv.use_source(config, massv.MINI_QUESTIONS)
        config.data.answers = f"{folder}/answers"
        config.data.answer_images = massv.MINI_QUESTIONS[1]
        config.run.init_from = f"{folder}/phase1"
        massv.use_steps(config, 300, 2e-3)
    return common.complete(config, Experiment)
