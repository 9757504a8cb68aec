"""What a drafter is made of, as one frozen value."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args

from core_jax.models.gemma3 import Gemma3Config
from core_jax.models.gemma3_text import Gemma3TextConfig
from core_jax.models.qwen2 import Qwen2Config
from core_jax.models.qwen2_5_vl import Qwen2_5_VLConfig, Qwen2_5_VLTextConfig

Kind = Literal["merger", "mlp", "gemma", "prefix", "text"]
TargetConfig = Any  # Qwen2_5_VLConfig | Gemma3Config | PrefixConfig
TextConfig = Any  # Qwen2_5_VLTextConfig | Gemma3TextConfig | Qwen2Config


class DrafterError(ValueError):
    """A drafter of this form cannot be; the message says what would."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixConfig:
    """A target that reads an image as a prefix of embeddings, as VLV's captioner does.

    Attributes:
      num_embeddings: Q, the length of the prefix (77 in VLV).
      embed_dim: E, the width of what the drafter's projector reads.
      vocab_size: V of the target.
    """

    num_embeddings: int
    embed_dim: int
    vocab_size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrafterConfig:
    """A small language model behind another model's vision tower (arXiv 2505.10526).

    Attributes:
      kind: the projector. "merger" is Qwen2.5-VL's own form, on the tower's patches; "mlp" reads
        the target's merged image tokens; "gemma" is Gemma 3's form; "prefix" maps a target's
        prefix of embeddings; "text" sees no image (the baseline).
      pooling: side of the square of image tokens that the drafter sees as one: 1, 2 or 4.
      target: the target's configuration, of which the tower, the image tokens' number and the ids
        of placeholders are used.
      text: the small language model's.
    """

    kind: Kind
    pooling: int = 1
    target: TargetConfig
    text: TextConfig

    def __post_init__(self):
        if self.kind not in get_args(Kind):
            raise DrafterError(f"drafter kind {self.kind!r} is not one of {get_args(Kind)}")
        if self.pooling not in (1, 2, 4):
            raise DrafterError(f"pooling is {self.pooling}; it must be 1, 2 or 4")
        if self.kind in ("prefix", "text") and self.pooling != 1:
            raise DrafterError(f"a {self.kind!r} drafter has no grid of image tokens to pool")
        wanted = _NEEDS.get(self.kind)
        if wanted is not None and not isinstance(self.target, wanted[0]):
            raise DrafterError(
                f"a {self.kind!r} drafter goes with a target of {wanted[0].__name__}, not of "
                f"{type(self.target).__name__}; kinds for it: {kinds_for(self.target)}"
            )
        if wanted is not None and not isinstance(self.text, wanted[1]):
            raise DrafterError(
                f"a {self.kind!r} drafter needs a language model of {wanted[1].__name__}, not of "
                f"{type(self.text).__name__}; targets and drafters must be of one family"
            )
        if self.kind == "gemma" and self.target.tokens_per_side % self.pooling:
            raise DrafterError(
                f"pooling {self.pooling} does not divide the {self.target.tokens_per_side} x "
                f"{self.target.tokens_per_side} image tokens"
            )

    @property
    def vocab_size(self) -> int:
        """V of the drafter; the target's may be padded further."""
        return self.text.vocab_size

    @property
    def target_vocab_size(self) -> int:
        """V of the target."""
        return getattr(self.target, "text_config", self.target).vocab_size

    @property
    def is_stock(self) -> bool:
        """Whether a hub's own architecture computes this drafter."""
        return self.kind in ("merger", "gemma") and self.pooling == 1

    @property
    def image_token_id(self) -> int | None:
        """The placeholder; None where images are a prefix."""
        if isinstance(self.target, Gemma3Config):
            return self.target.image_token_index
        return getattr(self.target, "image_token_id", None)

    @property
    def marker_ids(self) -> tuple[int, ...]:
        """Begin and end of an image in the prompt."""
        t = self.target
        if isinstance(t, Gemma3Config):
            return (t.boi_token_index, t.eoi_token_index)
        if isinstance(t, Qwen2_5_VLConfig):
            return (t.vision_start_token_id, t.vision_end_token_id)
        return ()

    @property
    def whole(self) -> Any:
        """The configuration of the multimodal model that this drafter is (a stock one, if it is).

        None for kinds without one ("prefix", "text").
        """
        if self.kind in ("merger", "mlp"):
            vision = dataclasses.replace(
                self.target.vision_config, out_hidden_size=self.text.hidden_size
            )
            return dataclasses.replace(self.target, text_config=self.text, vision_config=vision)
        if self.kind == "gemma":
            tokens = (self.target.tokens_per_side // self.pooling) ** 2
            return dataclasses.replace(
                self.target, text_config=self.text, mm_tokens_per_image=tokens
            )
        return None

    @classmethod
    def for_pair(
        cls, target: TargetConfig, language_model: TextConfig, *, kind: Kind | None = None,
        pooling: int = 1,
    ) -> "DrafterConfig":  # fmt: skip
        """Of two configurations as they are loaded from hub directories.

        Args:
          target: the target's.
          language_model: the small model's; a Qwen2 in front of a Qwen2.5-VL tower gets the
            target's three-dimensional positions (M-RoPE), which for text are its own.
          kind: the family's stock form if None.
          pooling: see the class.

        Raises:
          DrafterError: the two do not go together.
        """
        kind = kinds_for(target)[0] if kind is None else kind
        text = language_model
        if kind in ("merger", "mlp") and type(text) is Qwen2Config:
            sections = mrope_section(target.text_config.mrope_section, text.head_size)
            fields = {f.name: getattr(text, f.name) for f in dataclasses.fields(text)}
            text = Qwen2_5_VLTextConfig(**fields, mrope_section=sections)
        return cls(kind=kind, pooling=pooling, target=target, text=text)


def kinds_for(target: TargetConfig) -> tuple[Kind, ...]:
    """Kinds of drafters that a target can have, the default first."""
    if isinstance(target, Qwen2_5_VLConfig):
        return ("merger", "mlp", "text")
    if isinstance(target, Gemma3Config):
        return ("gemma", "text")
    if isinstance(target, PrefixConfig):
        return ("prefix", "text")
    raise DrafterError(
        f"{type(target).__name__} is no target: targets are Qwen2.5-VL, Gemma 3 with images, and "
        "models that read images as a prefix"
    )


def mrope_section(target: Sequence[int], head_dim: int) -> tuple[int, int, int]:
    """The target's sections for another head size: the same shares of the frequencies."""
    half, total = head_dim // 2, sum(target)
    time, row = (round(n * half / total) for n in target[:2])
    return time, row, half - time - row


_NEEDS: dict[str, tuple[Any, Any]] = {
    "merger": (Qwen2_5_VLConfig, Qwen2_5_VLTextConfig),
    "mlp": (Qwen2_5_VLConfig, Qwen2_5_VLTextConfig),
    "gemma": (Gemma3Config, Gemma3TextConfig),
    "prefix": (PrefixConfig, Qwen2Config),
}
