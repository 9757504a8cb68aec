"""Configuration of Florence-2."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from core_jax.models.hf_config import pick_fields

# The remote-code configuration's names of what transformers' own calls differently.
_REMOTE_VISION_NAMES = {"dim_embed": "embed_dim"}
_REMOTE_VOCAB_SIZE = 51289


@dataclasses.dataclass(frozen=True, kw_only=True)
class Florence2VisionConfig:
    """The DaViT tower and the head behind it; names and defaults are transformers'.

    Attributes:
      in_channels: of the image.
      depths: blocks of each stage; a block is a spatial and a channel block.
      patch_size, patch_stride, patch_padding: the convolution at the start of each stage.
      patch_prenorm: whether that convolution is normalised before it, not after.
      embed_dim: width of each stage.
      num_heads: heads of the window attention of each stage.
      num_groups: channel groups of the channel attention of each stage.
      window_size: side of a window, in positions.
      mlp_ratio: F / D.
      qkv_bias: whether the attention's input projections have a bias.
      activation_function: "gelu" (exact); no other is supported.
      projection_dim: D of the image tokens.
      max_position_embeddings: largest side of the last stage's grid.
      max_temporal_embeddings: rows of the frame table, of which an image uses the first.
      drop_path_rate, initializer_range: carried along; the tower here is deterministic.
    """

    in_channels: int = 3
    depths: tuple[int, ...] = (1, 1, 9, 1)
    patch_size: tuple[int, ...] = (7, 3, 3, 3)
    patch_stride: tuple[int, ...] = (4, 2, 2, 2)
    patch_padding: tuple[int, ...] = (3, 1, 1, 1)
    patch_prenorm: tuple[bool, ...] = (False, True, True, True)
    embed_dim: tuple[int, ...] = (128, 256, 512, 1024)
    num_heads: tuple[int, ...] = (4, 8, 16, 32)
    num_groups: tuple[int, ...] = (4, 8, 16, 32)
    window_size: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    activation_function: str = "gelu"
    projection_dim: int = 1024
    max_position_embeddings: int = 50
    max_temporal_embeddings: int = 100
    drop_path_rate: float = 0.1
    initializer_range: float = 0.02

    def __post_init__(self):
        per_stage = ("patch_size", "patch_stride", "patch_padding", "patch_prenorm", "embed_dim",
                     "num_heads", "num_groups")  # fmt: skip
        for name in per_stage:
            if len(getattr(self, name)) != len(self.depths):
                raise ValueError(
                    f"vision_config.{name} has {len(getattr(self, name))} entries, but depths "
                    f"names {len(self.depths)} stages"
                )
        for name in ("num_heads", "num_groups"):
            if any(d % n for d, n in zip(self.embed_dim, getattr(self, name), strict=True)):
                raise ValueError(
                    f"vision_config.embed_dim {self.embed_dim} does not divide into {name} "
                    f"{getattr(self, name)}"
                )
        if self.activation_function != "gelu":
            raise ValueError(
                f"vision_config.activation_function {self.activation_function!r} is not "
                "supported: gelu"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Florence2VisionConfig":
        """From `vision_config`, transformers' or the remote code's.

        Raises:
          ValueError: an image head that is not Florence-2's.
        """
        config = {_REMOTE_VISION_NAMES.get(k, k): v for k, v in config.items()}
        temporal = config.pop("visual_temporal_embedding", None)
        if temporal is not None:
            _expect("visual_temporal_embedding.type", temporal["type"], "COSINE")
            config["max_temporal_embeddings"] = temporal["max_temporal_embeddings"]
        position = config.pop("image_pos_embed", None)
        if position is not None:
            _expect("image_pos_embed.type", position["type"], "learned_abs_2d")
            config["max_position_embeddings"] = position["max_pos_embeddings"]
        source = config.pop("image_feature_source", None)
        if source is not None:
            _expect("image_feature_source", list(source), ["spatial_avg_pool", "temporal_avg_pool"])
        return cls(**pick_fields(cls, config))


def _expect(name: str, value: Any, supported: Any) -> None:
    if value != supported:
        raise ValueError(f"vision_config.{name} {value!r} is not supported: {supported!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BartConfig:
    """BART (arXiv 1910.13461); names and defaults are transformers'.

    Attributes:
      vocab_size: V.
      d_model: D.
      max_position_embeddings: the longest sequence; the tables have two more rows.
      encoder_layers, encoder_attention_heads, encoder_ffn_dim: the encoder's layers, N and F.
      decoder_layers, decoder_attention_heads, decoder_ffn_dim: the decoder's.
      activation_function: "gelu" (exact); no other is supported.
      scale_embedding: token embeddings are multiplied by sqrt(D).
      pad_token_id, bos_token_id, eos_token_id, decoder_start_token_id, forced_bos_token_id,
        forced_eos_token_id: for generation; the network itself uses none of them.
      dropout, attention_dropout, activation_dropout, init_std: carried along; the network here
        is deterministic.
    """

    vocab_size: int = 50265
    d_model: int = 1024
    max_position_embeddings: int = 1024
    encoder_layers: int = 12
    encoder_attention_heads: int = 16
    encoder_ffn_dim: int = 4096
    decoder_layers: int = 12
    decoder_attention_heads: int = 16
    decoder_ffn_dim: int = 4096
    activation_function: str = "gelu"
    scale_embedding: bool = False
    pad_token_id: int = 1
    bos_token_id: int = 0
    eos_token_id: int = 2
    decoder_start_token_id: int = 2
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = 2
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    init_std: float = 0.02

    def __post_init__(self):
        for name in ("encoder_attention_heads", "decoder_attention_heads"):
            if self.d_model % getattr(self, name):
                raise ValueError(
                    f"text_config.d_model {self.d_model} does not divide into {name} "
                    f"{getattr(self, name)}"
                )
        if self.activation_function != "gelu":
            raise ValueError(
                f"text_config.activation_function {self.activation_function!r} is not supported: "
                "gelu"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "BartConfig":
        """From `text_config`, transformers' or the remote code's.

        Raises:
          ValueError: a pre-norm or final-norm variant.
        """
        for name in ("normalize_before", "add_final_layer_norm", "add_bias_logits"):
            if config.get(name):
                raise ValueError(f"text_config.{name} is true, which is not supported")
        # For these a null says "none", not "the default".
        forced = ("forced_bos_token_id", "forced_eos_token_id")
        nulls: dict[str, Any] = {n: None for n in forced if n in config and config[n] is None}
        return cls(**pick_fields(cls, config), **nulls)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Florence2Config:
    """Florence-2 (arXiv 2311.06242).

    Attributes:
      vision_config: the tower and the image head.
      text_config: the encoder and the decoder.
      image_token_id: the placeholder of one image feature in transformers' input ids. The models
        here put the features before the prompt and never look it up. microsoft's checkpoints have
        no such token; theirs reads as vocab_size, the row that transformers would have to add.
    """

    vision_config: Florence2VisionConfig = Florence2VisionConfig()
    text_config: BartConfig = BartConfig()
    image_token_id: int = 51289

    def __post_init__(self):
        if self.vision_config.projection_dim != self.text_config.d_model:
            raise ValueError(
                f"vision_config.projection_dim {self.vision_config.projection_dim} is not "
                f"text_config.d_model {self.text_config.d_model}"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Florence2Config":
        """From config.json of transformers or of microsoft's remote code.

        Raises:
          ValueError: a variant that is not supported.
        """
        vision = config.get("vision_config") or {}
        text = dict(config.get("text_config") or {})
        if "dim_embed" in vision:  # the remote code's own defaults
            text.setdefault("vocab_size", config.get("vocab_size", _REMOTE_VOCAB_SIZE))
            config = {"image_token_id": text["vocab_size"], **config}
        return cls(
            vision_config=Florence2VisionConfig.from_hf(vision),
            text_config=BartConfig.from_hf(text),
            **({"image_token_id": config["image_token_id"]} if "image_token_id" in config else {}),
        )

    def to_hf(self) -> dict[str, Any]:
        """As config.json of transformers' own Florence-2."""
        return {
            "architectures": ["Florence2ForConditionalGeneration"],
            "model_type": "florence2",
            "is_encoder_decoder": True,
            "tie_word_embeddings": True,
            "image_token_id": self.image_token_id,
            "vision_config": {
                "model_type": "florence_vision",
                **dataclasses.asdict(self.vision_config),
            },
            "text_config": {
                "model_type": "bart",
                "is_encoder_decoder": True,
                "tie_word_embeddings": True,
                **dataclasses.asdict(self.text_config),
            },
        }

    @classmethod
    def large(cls) -> "Florence2Config":
        """Florence-2-large as microsoft released it (770M)."""
        return cls(
            vision_config=Florence2VisionConfig(
                embed_dim=(256, 512, 1024, 2048), num_heads=(8, 16, 32, 64),
                num_groups=(8, 16, 32, 64), projection_dim=1024,
            ),
            text_config=_released_text(),
        )  # fmt: skip

    @classmethod
    def base(cls) -> "Florence2Config":
        """Florence-2-base as microsoft released it (230M)."""
        return cls(
            vision_config=Florence2VisionConfig(projection_dim=768),
            text_config=_released_text(
                d_model=768, encoder_layers=6, encoder_attention_heads=12, encoder_ffn_dim=3072,
                decoder_layers=6, decoder_attention_heads=12, decoder_ffn_dim=3072,
            ),
        )  # fmt: skip

    @classmethod
    def tiny(cls, *, vocab_size: int = 128) -> "Florence2Config":
        """A network for tests: an image of 64 pixels gives a 2 x 2 grid, so 5 image tokens."""
        return cls(
            vision_config=Florence2VisionConfig(
                depths=(1, 1, 2, 1), embed_dim=(16, 32, 48, 64), num_heads=(1, 2, 3, 4),
                num_groups=(1, 2, 3, 4), window_size=4, projection_dim=32,
                max_position_embeddings=10, drop_path_rate=0.0,
            ),
            text_config=BartConfig(
                vocab_size=vocab_size, d_model=32, max_position_embeddings=128, encoder_layers=2,
                encoder_attention_heads=4, encoder_ffn_dim=64, decoder_layers=2,
                decoder_attention_heads=4, decoder_ffn_dim=64,
            ),
            image_token_id=vocab_size - 1,
        )  # fmt: skip


def _released_text(**changes: Any) -> BartConfig:
    return BartConfig(
        vocab_size=_REMOTE_VOCAB_SIZE, forced_bos_token_id=0, attention_dropout=0.1,
        activation_dropout=0.1, **changes,
    )  # fmt: skip
