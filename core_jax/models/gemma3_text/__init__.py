"""Gemma 3's language model, which is the whole of the text-only 1B."""

from core_jax.models.gemma3_text.config import Gemma3TextConfig
from core_jax.models.gemma3_text.model import Gemma3ForCausalLM
from core_jax.models.gemma3_text.weights import FAMILY

__all__ = ["FAMILY", "Gemma3ForCausalLM", "Gemma3TextConfig"]
