"""Florence-2: DaViT tower, image projection, BART encoder and decoder with a cache."""

from core_jax.models.florence2.bart import BartCache
from core_jax.models.florence2.config import BartConfig, Florence2Config, Florence2VisionConfig
from core_jax.models.florence2.model import Florence2
from core_jax.models.florence2.weights import FAMILY

__all__ = [
    "FAMILY",
    "BartCache",
    "BartConfig",
    "Florence2",
    "Florence2Config",
    "Florence2VisionConfig",
]
