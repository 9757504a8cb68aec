"""Qwen2.5-VL: a window-attention vision tower and a Qwen2.5 with three positions a token."""

from core_jax.models.qwen2_5_vl.config import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLVisionConfig,
)
from core_jax.models.qwen2_5_vl.model import Qwen2_5_VLForConditionalGeneration
from core_jax.models.qwen2_5_vl.packing import (
    ImageBatch,
    ImagePromptError,
    PackedImages,
    PromptPlaces,
    pack_images,
    place_prompts,
)
from core_jax.models.qwen2_5_vl.weights import FAMILY

__all__ = [
    "FAMILY",
    "ImageBatch",
    "ImagePromptError",
    "PackedImages",
    "PromptPlaces",
    "Qwen2_5_VLConfig",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen2_5_VLTextConfig",
    "Qwen2_5_VLVisionConfig",
    "pack_images",
    "place_prompts",
]
