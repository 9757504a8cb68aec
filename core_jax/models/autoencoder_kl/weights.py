"""Names of image autoencoder checkpoints."""

import jax
import jax.numpy as jnp

from core_jax.convert.rules import Rename, WeightRules
from core_jax.models.autoencoder_kl.config import AutoencoderKLConfig
from core_jax.models.autoencoder_kl.model import AutoencoderKL
from core_jax.models.family import Family

_ATTENTION = r"^((?:en|de)coder\.mid_block\.attentions\.0\.)"


def _rules(config: AutoencoderKLConfig) -> WeightRules:
    del config
    return WeightRules(
        # The released files of Stable Diffusion 1 and 2 are older than the present names.
        legacy=(
            Rename(_ATTENTION + r"query\.", r"\1to_q."),
            Rename(_ATTENTION + r"key\.", r"\1to_k."),
            Rename(_ATTENTION + r"value\.", r"\1to_v."),
            Rename(_ATTENTION + r"proj_attn\.", r"\1to_out.0."),
        )
    )


def _example_inputs(config: AutoencoderKLConfig) -> tuple:
    size = config.downsampling
    return (jax.ShapeDtypeStruct((1, size, size, config.in_channels), jnp.float32),)


FAMILY = Family(
    name="autoencoder_kl",
    config=AutoencoderKLConfig,
    model=AutoencoderKL,
    example_inputs=_example_inputs,
    rules=_rules,
    file_name="diffusion_pytorch_model.safetensors",
    # No axes: heterogeneous tensors are sharded by size.
)
