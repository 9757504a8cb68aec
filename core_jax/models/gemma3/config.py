"""Configuration of Gemma 3 with its vision tower."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from core_jax.models.gemma3_text.config import Gemma3TextConfig
from core_jax.models.hf_config import pick_fields
from core_jax.models.siglip.config import SiglipVisionConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3Config:
    """Field names and defaults are transformers' (Gemma3Config).

    Attributes:
      text_config: the language model.
      vision_config: the SigLIP tower.
      mm_tokens_per_image: P, image tokens that an image becomes; a square number.
      image_token_index: the placeholder of an image token. It may lie outside the vocabulary
        (that of the 1B ends before it).
      boi_token_index, eoi_token_index: begin and end of an image, ordinary tokens.
      initializer_range, eos_token_id: carried along.
    """

    text_config: Gemma3TextConfig = Gemma3TextConfig()
    vision_config: SiglipVisionConfig = SiglipVisionConfig()
    mm_tokens_per_image: int = 256
    image_token_index: int = 262144
    boi_token_index: int = 255999
    eoi_token_index: int = 256000
    initializer_range: float = 0.02
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self):
        side, patches = math.isqrt(self.mm_tokens_per_image), self.vision_config.patches_per_side
        if side * side != self.mm_tokens_per_image or side < 1 or patches % side:
            raise ValueError(
                f"mm_tokens_per_image {self.mm_tokens_per_image} is not the number of equal "
                f"squares in a grid of {patches} x {patches} patches"
            )
        if self.text_config.final_logit_softcapping is not None:
            raise ValueError(
                "text_config.final_logit_softcapping is not supported in the multimodal Gemma 3: "
                "transformers reads it there and does not apply it"
            )

    @property
    def tokens_per_side(self) -> int:
        """Side of the grid of image tokens."""
        return math.isqrt(self.mm_tokens_per_image)

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the output head is the token table."""
        return self.text_config.tie_word_embeddings

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Gemma3Config":
        """From config.json.

        Raises:
          ValueError: a variant that is not supported.
        """
        names = {"image_token_id": "image_token_index", "boi_token_id": "boi_token_index",
                 "eoi_token_id": "eoi_token_index"}  # fmt: skip
        config = {names.get(k, k): v for k, v in config.items()}
        text = dict(config.get("text_config") or {})
        tied = config.get("tie_word_embeddings")
        if tied is not None:  # of the two, transformers goes by the outer one
            text["tie_word_embeddings"] = tied
        fields: dict[str, Any] = pick_fields(cls, config)
        fields["text_config"] = Gemma3TextConfig.from_hf(text)
        fields["vision_config"] = SiglipVisionConfig.from_hf(config.get("vision_config") or {})
        return cls(**fields)

    def to_hf(self) -> dict[str, Any]:
        """As config.json, for transformers 4 and 5."""
        text, vision = self.text_config.to_hf(), self.vision_config.to_hf()
        for part in (text, vision):
            del part["architectures"]
        own = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("text_config", "vision_config")
        }
        return {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "model_type": "gemma3",
            "tie_word_embeddings": self.tie_word_embeddings,
            **own,
            "text_config": text,
            "vision_config": vision,
        }

    @classmethod
    def gemma3_4b(cls) -> "Gemma3Config":
        """Gemma-3-4B."""
        return _released(Gemma3TextConfig.gemma3_4b())

    @classmethod
    def gemma3_12b(cls) -> "Gemma3Config":
        """Gemma-3-12B."""
        return _released(Gemma3TextConfig.gemma3_12b())

    @classmethod
    def gemma3_27b(cls) -> "Gemma3Config":
        """Gemma-3-27B."""
        return _released(Gemma3TextConfig.gemma3_27b())

    @classmethod
    def drafter_1b(cls) -> "Gemma3Config":
        """Gemma-3-1B behind Gemma 3's tower: the drafter that MASSV makes."""
        return _released(Gemma3TextConfig.gemma3_1b())


def _released(text: Gemma3TextConfig) -> Gemma3Config:
    return Gemma3Config(
        text_config=text, vision_config=SiglipVisionConfig.so400m_896(), eos_token_id=(1, 106)
    )
