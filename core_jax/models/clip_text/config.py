"""Configuration of CLIP's text transformer."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from core_jax.models.hf_config import pick_fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPTextConfig:
    """Field names are transformers' (CLIPTextConfig), so are the defaults.

    Attributes:
      vocab_size: V.
      hidden_size: D.
      intermediate_size: F.
      num_hidden_layers: transformer layers.
      num_attention_heads: N.
      max_position_embeddings: the longest sequence (77 in every Stable Diffusion).
      hidden_act: "quick_gelu" (CLIP-L) or "gelu" (OpenCLIP-H, exact).
      layer_norm_eps: epsilon of every normalisation.
      projection_dim, bos_token_id, eos_token_id, pad_token_id: carried along for other readers.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512
    bos_token_id: int = 49406
    eos_token_id: int = 49407
    pad_token_id: int = 1

    def __post_init__(self):
        if self.hidden_act not in ("quick_gelu", "gelu"):
            raise ValueError(f"hidden_act {self.hidden_act!r} is not supported: quick_gelu, gelu")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} does not divide into "
                f"{self.num_attention_heads} heads"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "CLIPTextConfig":
        """From config.json; also from the `text_config` of a whole CLIP."""
        if config.get("model_type") == "clip" and "text_config" in config:
            config = config["text_config"]
        return cls(**pick_fields(cls, config))

    def to_hf(self) -> dict[str, Any]:
        """As config.json."""
        return {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            **dataclasses.asdict(self),
        }

    @classmethod
    def sd21(cls) -> "CLIPTextConfig":
        """Stable Diffusion 2.1: OpenCLIP ViT-H's text tower without its last layer."""
        return cls(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=23,
            num_attention_heads=16, hidden_act="gelu", projection_dim=512,
            bos_token_id=0, eos_token_id=2,
        )  # fmt: skip

    @classmethod
    def sd15(cls) -> "CLIPTextConfig":
        """Stable Diffusion 1.5: CLIP ViT-L/14's text tower."""
        return cls(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
            num_attention_heads=12, projection_dim=768, bos_token_id=0, eos_token_id=2,
        )  # fmt: skip
