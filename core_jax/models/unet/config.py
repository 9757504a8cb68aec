"""Configuration of the conditional denoising U-Net."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from core_jax.models.hf_config import pick_fields, refuse_unsupported

_CROSS_DOWN, _DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
_CROSS_UP, _UP = "CrossAttnUpBlock2D", "UpBlock2D"
_CROSS_MID, _MID = "UNetMidBlock2DCrossAttn", "UNetMidBlock2D"

# Fields of diffusers that we do not implement, with the one value at which they do nothing.
_MUST_BE: Mapping[str, Any] = {
    "center_input_sample": False,
    "dropout": 0.0,
    "act_fn": "silu",
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "num_attention_heads": None,
    "dual_cross_attention": False,
    "class_embed_type": None,
    "addition_embed_type": None,
    "num_class_embeds": None,
    "time_embedding_type": "positional",
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "class_embeddings_concat": False,
    "attention_type": "default",
}
# Fields that only matter together with one of the above, or with block types we refuse.
_WITHOUT_EFFECT = frozenset({
    "addition_time_embed_dim", "addition_embed_type_num_heads", "cross_attention_norm",
    "mid_block_only_cross_attention", "projection_class_embeddings_input_dim",
    "resnet_out_scale_factor", "resnet_skip_time_act",
})  # fmt: skip
_NULLABLE = ("sample_size", "mid_block_type", "time_embedding_dim")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNet2DConditionConfig:
    """Field names and defaults are diffusers' (UNet2DConditionModel).

    A field that is a tuple has one value for each resolution, from the highest to the lowest.

    Attributes:
      sample_size: latent height and width of training; carried along, not enforced.
      in_channels, out_channels: of the latents and of the prediction.
      flip_sin_to_cos, freq_shift: see `timestep_embedding`.
      down_block_types: CrossAttnDownBlock2D or DownBlock2D.
      mid_block_type: UNetMidBlock2DCrossAttn, UNetMidBlock2D (one residual block) or None.
      up_block_types: CrossAttnUpBlock2D or UpBlock2D, from the lowest resolution up.
      only_cross_attention: the first attention of a transformer block sees the context, too.
      block_out_channels: channels.
      layers_per_block: residual blocks on the way down; one more on the way up.
      downsample_padding: 1, or 0 for one pixel right and bottom.
      mid_block_scale_factor: the middle's residual blocks are divided by it.
      norm_num_groups, norm_eps: of every group normalisation in residual blocks and the output
        (in front of a transformer epsilon is 1e-6 whatever this says).
      cross_attention_dim: D of the context.
      transformer_layers_per_block: layers of each transformer.
      attention_head_dim: the NUMBER of heads N. The name is an old mistake of diffusers that
        every published configuration depends on.
      use_linear_projection: Linear instead of 1x1 convolutions around a transformer.
      upcast_attention: carried along; our attention logits are always float32.
      resnet_time_scale_shift: see `ResnetBlock`.
      time_embedding_dim: width of the time embedding; None: four times the first channels.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: int | float = 0
    down_block_types: tuple[str, ...] = (_CROSS_DOWN, _CROSS_DOWN, _CROSS_DOWN, _DOWN)
    mid_block_type: str | None = _CROSS_MID
    up_block_types: tuple[str, ...] = (_UP, _CROSS_UP, _CROSS_UP, _CROSS_UP)
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: int = 1
    mid_block_scale_factor: int | float = 1
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | tuple[int, ...] = 1280
    transformer_layers_per_block: int | tuple[Any, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    upcast_attention: bool = False
    resnet_time_scale_shift: str = "default"
    time_embedding_dim: int | None = None

    def __post_init__(self):
        self._check_block_types()
        for name in ("only_cross_attention", "layers_per_block", "cross_attention_dim",
                     "transformer_layers_per_block", "attention_head_dim"):  # fmt: skip
            self.per_block(name)
        if len(set(self.per_block("cross_attention_dim"))) > 1:
            raise ValueError(
                f"cross_attention_dim = {self.cross_attention_dim}: one context for all blocks is "
                "supported, so one size"
            )
        for level, (channels, heads) in enumerate(
            zip(self.block_out_channels, self.per_block("attention_head_dim"), strict=True)
        ):
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels[{level}] = {channels} does not divide into "
                    f"norm_num_groups = {self.norm_num_groups}"
                )
            if self.has_attention(level) and channels % heads:
                raise ValueError(
                    f"block_out_channels[{level}] = {channels} does not divide into {heads} heads "
                    "(attention_head_dim is the number of heads)"
                )
        if self.resnet_time_scale_shift not in ("default", "scale_shift"):
            raise ValueError(
                f"resnet_time_scale_shift {self.resnet_time_scale_shift!r} is not supported: "
                "default, scale_shift"
            )

    def _check_block_types(self) -> None:
        for name, supported in (
            ("down_block_types", (_CROSS_DOWN, _DOWN)),
            ("up_block_types", (_CROSS_UP, _UP)),
        ):
            types = getattr(self, name)
            if len(types) != self.num_levels:
                raise ValueError(
                    f"{name} has {len(types)} entries, block_out_channels {self.num_levels}"
                )
            if unsupported := sorted(set(types) - set(supported)):
                raise ValueError(f"{name} {unsupported} not supported: {', '.join(supported)}")
        if self.mid_block_type not in (_CROSS_MID, _MID, None):
            raise ValueError(
                f"mid_block_type {self.mid_block_type!r} is not supported: {_CROSS_MID}, {_MID}, "
                "null"
            )

    @property
    def num_levels(self) -> int:
        """Resolutions."""
        return len(self.block_out_channels)

    @property
    def downsampling(self) -> int:
        """Latent height and width must be multiples of this."""
        return 2 ** (self.num_levels - 1)

    def per_block(self, name: str) -> tuple:
        """The values of a field, one for each resolution.

        Raises:
          ValueError: there are more or fewer, or they are nested.
        """
        value = getattr(self, name)
        values = value if isinstance(value, tuple) else (value,) * self.num_levels
        if len(values) != self.num_levels:
            raise ValueError(
                f"{name} has {len(values)} entries, block_out_channels {self.num_levels}"
            )
        if any(isinstance(v, tuple) for v in values):
            raise ValueError(f"{name} = {value} is nested, which is not supported")
        return values

    def has_attention(self, level: int) -> bool:
        """Whether any block at this resolution has transformers."""
        last = level == self.num_levels - 1
        return (
            self.down_block_types[level] == _CROSS_DOWN
            or self.up_block_types[self.num_levels - 1 - level] == _CROSS_UP
            or (last and self.mid_block_type == _CROSS_MID)
        )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "UNet2DConditionConfig":
        """From config.json.

        Raises:
          ValueError: a field asks for something that is not implemented; all such are named.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        refuse_unsupported("UNet2DConditionModel", config, known, _MUST_BE, _WITHOUT_EFFECT)
        if nulls := [n for n in known if n in config and config[n] is None and n not in _NULLABLE]:
            raise ValueError(f"{', '.join(sorted(nulls))}: null is not supported")
        fields = pick_fields(cls, config)
        if "mid_block_type" in config:  # here null is a value, not the default
            fields["mid_block_type"] = config["mid_block_type"]
        for name in ("down_block_types", "up_block_types"):
            if name in fields:  # names of the first releases
                fields[name] = tuple(t.removeprefix("UNetRes") for t in fields[name])
        return cls(**fields)

    def to_hf(self) -> dict[str, Any]:
        """As config.json."""
        return {"_class_name": "UNet2DConditionModel", **dataclasses.asdict(self)}

    @classmethod
    def sd21_base(cls) -> "UNet2DConditionConfig":
        """Stable Diffusion 2.1-base (512 pixels, epsilon prediction)."""
        return cls(
            sample_size=64, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20),
            use_linear_projection=True,
        )  # fmt: skip

    @classmethod
    def sd15(cls) -> "UNet2DConditionConfig":
        """Stable Diffusion 1.5."""
        return cls(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
