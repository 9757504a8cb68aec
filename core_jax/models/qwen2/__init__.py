"""Qwen2 and Qwen2.5, with a path from embeddings and a key-value cache."""

from core_jax.models.qwen2.config import Qwen2Config
from core_jax.models.qwen2.model import Qwen2ForCausalLM
from core_jax.models.qwen2.weights import FAMILY

__all__ = ["FAMILY", "Qwen2Config", "Qwen2ForCausalLM"]
