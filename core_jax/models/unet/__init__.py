"""The denoiser of Stable Diffusion 1 and 2."""

from core_jax.models.unet.config import UNet2DConditionConfig
from core_jax.models.unet.model import UNet2DConditionModel
from core_jax.models.unet.weights import FAMILY

__all__ = ["FAMILY", "UNet2DConditionConfig", "UNet2DConditionModel"]
