"""CLIP's text transformer, with a path that takes embeddings in place of ids."""

from core_jax.models.clip_text.config import CLIPTextConfig
from core_jax.models.clip_text.model import CLIPTextModel
from core_jax.models.clip_text.weights import FAMILY

__all__ = ["FAMILY", "CLIPTextConfig", "CLIPTextModel"]
