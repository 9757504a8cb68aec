"""SigLIP's vision tower, as Gemma 3 and other language models look through it."""

from core_jax.models.siglip.config import SiglipVisionConfig
from core_jax.models.siglip.model import SiglipVisionModel
from core_jax.models.siglip.weights import FAMILY

__all__ = ["FAMILY", "SiglipVisionConfig", "SiglipVisionModel"]
