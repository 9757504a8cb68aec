"""The certificate that a drafter leaves a target's output as it is.

Greedy answers equal plain decoding's, and the compiled accept rule on recorded distributions draws
from the target's (100,000 keys a context), each beside a rule that must fail.
"""

from ml_collections import ConfigDict

from configs import massv, massv_eval


def get_config(variant: str = "") -> ConfigDict:
    name = massv.resolve(variant, "massv_lossless")
    config = massv_eval.get_config(name)
    config.task = "lossless"
    # Rounding decides near-ties; in float32 there are next to none.
    config.model.frozen_dtype = config.model.compute_dtype = "float32"
    config.evaluation.num_prompts = 32
    config.evaluation.gammas = (5,)
    return config
