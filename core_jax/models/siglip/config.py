"""Configuration of SigLIP's vision tower."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from core_jax.models.hf_config import pick_fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiglipVisionConfig:
    """Field names and defaults are transformers' (SiglipVisionConfig).

    Attributes:
      hidden_size: D.
      intermediate_size: F.
      num_hidden_layers: transformer layers.
      num_attention_heads: N.
      num_channels: of the image.
      image_size: side of the square image, in pixels.
      patch_size: side of a patch, in pixels; what is left over at the right and at the bottom is
        not looked at.
      layer_norm_eps: epsilon of every normalisation.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 16
    layer_norm_eps: float = 1e-6

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"vision hidden_size {self.hidden_size} does not divide into "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.image_size < self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is smaller than patch_size {self.patch_size}"
            )

    @property
    def patches_per_side(self) -> int:
        """Side of the grid of patches."""
        return self.image_size // self.patch_size

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "SiglipVisionConfig":
        """From config.json of a tower, or the `vision_config` of a larger model.

        Raises:
          ValueError: another activation, or images that are not square.
        """
        if config.get("hidden_act", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
            raise ValueError(
                f"SigLIP: hidden_act {config['hidden_act']!r} is not supported (only "
                "'gelu_pytorch_tanh' is)"
            )
        fields = pick_fields(cls, config)
        for name in ("image_size", "patch_size"):
            sides = fields.get(name)
            if isinstance(sides, tuple):
                if len(set(sides)) != 1:
                    raise ValueError(f"SigLIP: {name} {sides} is not square")
                fields[name] = sides[0]
        return cls(**fields)

    def to_hf(self) -> dict[str, Any]:
        """As config.json; the pooling head of contrastive training is not part of the tower."""
        return {
            "architectures": ["SiglipVisionModel"],
            "model_type": "siglip_vision_model",
            "hidden_act": "gelu_pytorch_tanh",
            "attention_dropout": 0.0,
            "vision_use_head": False,
            **dataclasses.asdict(self),
        }

    @classmethod
    def so400m_896(cls) -> "SiglipVisionConfig":
        """Gemma 3's tower: 400 M parameters, 896 pixels, 64 x 64 patches."""
        return cls(
            hidden_size=1152, intermediate_size=4304, num_hidden_layers=27,
            num_attention_heads=16, image_size=896, patch_size=14,
        )  # fmt: skip
