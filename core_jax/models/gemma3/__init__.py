"""Gemma 3 with images; the text-only 1B is core_jax.models.gemma3_text."""

from core_jax.models.gemma3.config import Gemma3Config
from core_jax.models.gemma3.model import Gemma3ForConditionalGeneration
from core_jax.models.gemma3.prompt import ImagePromptError, check_placeholders
from core_jax.models.gemma3.weights import FAMILY

__all__ = [
    "FAMILY",
    "Gemma3Config",
    "Gemma3ForConditionalGeneration",
    "ImagePromptError",
    "check_placeholders",
]
