"""Accepted length, acceptance by position, TVD and speed of a drafter.

Gamma 5 at temperatures 0 and 1 is the paper's setting; others are tried beside it, since with a
drafter of a fifth of the target's cost 5 is past the optimum.
"""

from ml_collections import ConfigDict

from configs import common, massv
from massv_jax.experiment import Experiment


def get_config(variant: str = "") -> ConfigDict:
    name = massv.resolve(variant, "massv_eval")
    config = massv.base(name, "eval")
    config.model.drafter = "runs/massv_phase2"
    _use_held_out(config, name)
    return common.complete(config, Experiment)


def _use_held_out(config: ConfigDict, name: str) -> None:
    """Questions whose images training excludes (data.exclude)."""
    source = {"kind": "llava", "path": massv.HELD_OUT[0], "images": massv.HELD_OUT[1]}
    if massv.is_mini(name):
        source = {"kind": "llava", "path": "runs/miniature_llava/heldout.json",
                  "images": massv.MINI_QUESTIONS[1]}  # fmt: skip
        config.model.drafter = f"{massv.MINI_RUNS[name]}/phase2"
        config.decoding.update(max_new_tokens=64, prompt_lengths=(64, 96))
    config.evaluation.source = ConfigDict(source)
