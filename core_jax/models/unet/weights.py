"""Names of U-Net checkpoints."""

import jax
import jax.numpy as jnp

from core_jax.convert.rules import WeightRules
from core_jax.models.family import Family
from core_jax.models.unet.config import UNet2DConditionConfig
from core_jax.models.unet.model import UNet2DConditionModel


def _rules(config: UNet2DConditionConfig) -> WeightRules:
    del config
    return WeightRules(plain=("linear_1", "linear_2"))


def _example_inputs(config: UNet2DConditionConfig) -> tuple:
    size = config.downsampling
    return (
        jax.ShapeDtypeStruct((1, size, size, config.in_channels), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
        jax.ShapeDtypeStruct((1, 1, config.per_block("cross_attention_dim")[0]), jnp.float32),
    )


FAMILY = Family(
    name="unet",
    config=UNet2DConditionConfig,
    model=UNet2DConditionModel,
    example_inputs=_example_inputs,
    rules=_rules,
    file_name="diffusion_pytorch_model.safetensors",
    # No axes: several hundred heterogeneous tensors are sharded by size.
)
