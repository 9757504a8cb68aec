"""Configuration of the image autoencoder."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from core_jax.models.hf_config import pick_fields, refuse_unsupported

_DOWN, _UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
# Fields of diffusers that we do not implement, with the one value at which they do nothing.
_MUST_BE: Mapping[str, Any] = {"act_fn": "silu", "latents_mean": None, "latents_std": None}
_NULLABLE = ("shift_factor",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderKLConfig:
    """Field names and defaults are diffusers' (AutoencoderKL).

    Attributes:
      in_channels, out_channels: of images.
      down_block_types: DownEncoderBlock2D, one for each resolution.
      up_block_types: UpDecoderBlock2D, one for each resolution.
      block_out_channels: channels of each resolution, from the highest to the lowest.
      layers_per_block: residual blocks of a resolution in the encoder; one more in the decoder.
      latent_channels: of the latents.
      norm_num_groups: of every group normalisation (epsilon is always 1e-6).
      sample_size: image height and width of training; carried along, not enforced.
      scaling_factor, shift_factor: see `scale_latents`.
      force_upcast: carried along: this network overflows in float16, so hold it in float32 or
        bfloat16.
      use_quant_conv, use_post_quant_conv: 1x1 convolutions on both sides of the latents.
      mid_block_add_attention: attention at the lowest resolution.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = (_DOWN,)
    up_block_types: tuple[str, ...] = (_UP,)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, int] = 32
    scaling_factor: int | float = 0.18215
    shift_factor: int | float | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self):
        levels = len(self.block_out_channels)
        for name, supported in (("down_block_types", _DOWN), ("up_block_types", _UP)):
            types = getattr(self, name)
            if len(types) != levels:
                raise ValueError(f"{name} has {len(types)} entries, block_out_channels {levels}")
            if unsupported := sorted(set(types) - {supported}):
                raise ValueError(f"{name} {unsupported} not supported: {supported}")
        for level, channels in enumerate(self.block_out_channels):
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels[{level}] = {channels} does not divide into "
                    f"norm_num_groups = {self.norm_num_groups}"
                )

    @property
    def downsampling(self) -> int:
        """Image pixels a latent pixel, along each axis."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "AutoencoderKLConfig":
        """From config.json.

        Raises:
          ValueError: a field asks for something that is not implemented; all such are named.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        refuse_unsupported("AutoencoderKL", config, known, _MUST_BE, frozenset())
        if nulls := [n for n in known if n in config and config[n] is None and n not in _NULLABLE]:
            raise ValueError(f"{', '.join(sorted(nulls))}: null is not supported")
        return cls(**pick_fields(cls, config))

    def to_hf(self) -> dict[str, Any]:
        """As config.json."""
        return {"_class_name": "AutoencoderKL", "act_fn": "silu", **dataclasses.asdict(self)}

    @classmethod
    def sd21(cls) -> "AutoencoderKLConfig":
        """Stable Diffusion 1 and 2 (the same architecture; 2 ships other weights)."""
        return cls(
            down_block_types=(_DOWN,) * 4,
            up_block_types=(_UP,) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            sample_size=768,
        )
