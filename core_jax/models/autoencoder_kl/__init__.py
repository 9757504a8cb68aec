"""The image autoencoder of Stable Diffusion 1 and 2."""

from core_jax.models.autoencoder_kl.config import AutoencoderKLConfig
from core_jax.models.autoencoder_kl.model import (
    AutoencoderKL,
    sample_latents,
    scale_latents,
    unscale_latents,
)
from core_jax.models.autoencoder_kl.weights import FAMILY

__all__ = [
    "FAMILY",
    "AutoencoderKL",
    "AutoencoderKLConfig",
    "sample_latents",
    "scale_latents",
    "unscale_latents",
]
