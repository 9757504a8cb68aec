"""Configuration of Qwen2.5-VL (arXiv 2502.13923)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from core_jax.models.hf_config import pick_fields
from core_jax.models.qwen2.config import Qwen2Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2_5_VLTextConfig(Qwen2Config):
    """Qwen2.5 with three positions a token; defaults are transformers' Qwen2_5_VLTextConfig.

    Attributes:
      mrope_section: how many of the H/2 rotary frequencies turn by time, by row, by column.
    """

    vocab_size: int = 152064
    hidden_size: int = 8192
    intermediate_size: int = 29568
    num_hidden_layers: int = 80
    num_attention_heads: int = 64
    num_key_value_heads: int | None = 8
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6
    bos_token_id: int | None = 151643
    eos_token_id: int | tuple[int, ...] | None = 151645
    mrope_section: tuple[int, int, int] = (16, 24, 24)

    def __post_init__(self):
        super().__post_init__()
        if self.head_size * self.num_attention_heads != self.hidden_size:
            raise ValueError(
                f"head_dim {self.head_dim}: Qwen2.5-VL's heads are hidden_size "
                f"{self.hidden_size} / {self.num_attention_heads}"
            )
        if len(self.mrope_section) != 3 or 2 * sum(self.mrope_section) != self.head_size:
            raise ValueError(
                f"mrope_section {self.mrope_section} must be three numbers that sum to half of "
                f"the head size {self.head_size}"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Qwen2_5_VLTextConfig":
        """From the text fields of a config.json, nested or flat.

        Raises:
          ValueError: as `Qwen2Config.from_hf`.
        """
        rope = dict(config.get("rope_parameters") or {}) | dict(config.get("rope_scaling") or {})
        kind = rope.pop("rope_type", rope.pop("type", "default"))
        rope.pop("type", None)
        plain = {k: v for k, v in config.items() if k not in ("rope_scaling", "rope_parameters")}
        if "mrope_section" in rope:
            plain["mrope_section"] = rope.pop("mrope_section")
        plain["rope_parameters"] = {**rope, "rope_type": "default" if kind == "mrope" else kind}
        return cast("Qwen2_5_VLTextConfig", super().from_hf(plain))  # of this class


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2_5_VLVisionConfig:
    """Field names are transformers' (Qwen2_5_VLVisionConfig).

    Attributes:
      depth: blocks.
      hidden_size: D.
      intermediate_size: F.
      num_heads: N.
      in_channels: of a pixel.
      patch_size: side of a patch in pixels.
      spatial_merge_size: side of the square of patches that becomes one image token.
      temporal_patch_size: frames of a patch; a still image is repeated.
      window_size: side of an attention window in pixels.
      out_hidden_size: width of an image token.
      fullatt_block_indexes: blocks that see a whole image; all others see a window.
      tokens_per_second, initializer_range: carried along for other readers.
    """

    depth: int = 32
    hidden_size: int = 1280
    intermediate_size: int = 3420
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    window_size: int = 112
    out_hidden_size: int = 3584
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    tokens_per_second: int = 4
    initializer_range: float = 0.02

    def __post_init__(self):
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(
                f"vision: hidden_size {self.hidden_size} must divide into {self.num_heads} heads "
                "of a multiple of 4 (two rotary pairs)"
            )
        if self.window_side < 1:
            raise ValueError(
                f"vision: window_size {self.window_size} is smaller than one image token of "
                f"{self.patch_size * self.spatial_merge_size} pixels"
            )

    @property
    def head_dim(self) -> int:
        """H."""
        return self.hidden_size // self.num_heads

    @property
    def window_side(self) -> int:
        """Side of a window in image tokens."""
        return self.window_size // self.spatial_merge_size // self.patch_size

    @property
    def merge_unit(self) -> int:
        """Patches of one image token."""
        return self.spatial_merge_size**2

    @property
    def window_patches(self) -> int:
        """Patches of one whole window."""
        return self.window_side**2 * self.merge_unit

    @property
    def patch_values(self) -> int:
        """Numbers in one patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Qwen2_5_VLVisionConfig":
        """From a config.json's `vision_config` (released ones say `in_chans`).

        Raises:
          ValueError: another activation or other rotary embeddings than the released.
        """
        problems = []
        if config.get("hidden_act", "silu") != "silu":
            problems.append(f"hidden_act {config['hidden_act']!r} (only 'silu' is)")
        rope = config.get("rope_parameters") or {}
        if rope.get("rope_type", "axial") != "axial" or rope.get("rope_theta", 1e4) != 1e4:
            problems.append(f"rope_parameters {dict(rope)} (only axial of base 10000 is)")
        if problems:
            raise ValueError(f"Qwen2.5-VL vision: not supported here: {'; '.join(problems)}")
        channels = {"in_channels": config["in_chans"]} if "in_chans" in config else {}
        fields = pick_fields(cls, {**channels, **config})
        # transformers' default differs from every release, which all state it.
        return cls(**{"hidden_size": 3584, **fields})

    def to_hf(self) -> dict[str, Any]:
        """As `vision_config` in config.json."""
        fields = dataclasses.asdict(self)
        return {
            "model_type": "qwen2_5_vl",
            "hidden_act": "silu",
            **fields,
            "fullatt_block_indexes": list(self.fullatt_block_indexes),
            "in_chans": self.in_channels,
            "spatial_patch_size": self.patch_size,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2_5_VLConfig:
    """Field names are transformers' (Qwen2_5_VLConfig).

    Attributes:
      text_config, vision_config: the two networks.
      image_token_id: the placeholder that an image token replaces.
      video_token_id: the same for videos, which this port does not read.
      vision_start_token_id, vision_end_token_id: around the placeholders of one image.
    """

    text_config: Qwen2_5_VLTextConfig
    vision_config: Qwen2_5_VLVisionConfig
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653

    def __post_init__(self):
        text, vision = self.text_config.hidden_size, self.vision_config.out_hidden_size
        if text != vision:
            raise ValueError(
                f"vision_config.out_hidden_size {vision} is not the text model's hidden_size {text}"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Qwen2_5_VLConfig":
        """From config.json with the text fields at the top (released) or in `text_config`.

        Raises:
          ValueError: the checkpoint uses what this port lacks.
        """
        text = dict(config.get("text_config") or config)
        tied = config.get("tie_word_embeddings") or text.get("tie_word_embeddings")
        text["tie_word_embeddings"] = bool(tied)
        return cls(
            **pick_fields(cls, {k: v for k, v in config.items() if k.endswith("_id")}),
            text_config=Qwen2_5_VLTextConfig.from_hf(text),
            vision_config=Qwen2_5_VLVisionConfig.from_hf(config.get("vision_config") or {}),
        )

    def to_hf(self) -> dict[str, Any]:
        """As the released config.json, which transformers 4 and 5 read."""
        text = self.text_config.to_hf()
        section = text.pop("mrope_section")
        text.pop("rope_parameters")
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            **text,
            **{k: v for k, v in own.items() if k.endswith("_id")},
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "rope_scaling": {"type": "mrope", "mrope_section": list(section)},
            "vision_config": self.vision_config.to_hf(),
        }

    @classmethod
    def qwen2p5_vl_3b(cls) -> "Qwen2_5_VLConfig":
        """Qwen2.5-VL-3B-Instruct: a tied head."""
        text = Qwen2_5_VLTextConfig(
            vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
            num_attention_heads=16, num_key_value_heads=2, tie_word_embeddings=True, **_RELEASED,
        )  # fmt: skip
        return cls(text_config=text, vision_config=_vision(out_hidden_size=2048))

    @classmethod
    def qwen2p5_vl_7b(cls) -> "Qwen2_5_VLConfig":
        """Qwen2.5-VL-7B-Instruct."""
        text = Qwen2_5_VLTextConfig(
            vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
            num_attention_heads=28, num_key_value_heads=4, **_RELEASED,
        )  # fmt: skip
        return cls(text_config=text, vision_config=_vision(out_hidden_size=3584))

    @classmethod
    def qwen2p5_vl_32b(cls) -> "Qwen2_5_VLConfig":
        """Qwen2.5-VL-32B-Instruct: its tower has wider MLPs than the 3B's and the 7B's."""
        text = Qwen2_5_VLTextConfig(
            vocab_size=152064, hidden_size=5120, intermediate_size=27648, num_hidden_layers=64,
            num_attention_heads=40, num_key_value_heads=8, **_RELEASED,
        )  # fmt: skip
        vision = _vision(out_hidden_size=5120, intermediate_size=3456)
        return cls(text_config=text, vision_config=vision)


_RELEASED: dict[str, Any] = {"rms_norm_eps": 1e-6, "max_position_embeddings": 128000}


def _vision(**fields: Any) -> Qwen2_5_VLVisionConfig:
    return Qwen2_5_VLVisionConfig(tokens_per_second=2, **fields)
