"""Architectures of the stand-ins: the full-size classes at the smallest useful sizes.

| full size                  | stand-in                         |
|----------------------------|----------------------------------|
| Stable Diffusion 2.1-base  | stable-diffusion (a pipeline)    |
| Florence-2-large           | florence2                        |
| Qwen2.5 0.5B / 1.5B / 3B   | qwen2.5-small / -medium / -large |
| Qwen2.5-VL-7B-Instruct     | qwen2.5-vl                       |
| Qwen2.5-1.5B-Instruct      | qwen2.5-text                     |
| gemma-3-12b-it             | gemma-3                          |
| gemma-3-1b-it              | gemma-3-text                     |
"""

import dataclasses
import pathlib

from core_jax.diffusion.schedule import NoiseSchedule
from core_jax.models.autoencoder_kl import AutoencoderKLConfig
from core_jax.models.clip_text import CLIPTextConfig
from core_jax.models.florence2 import BartConfig, Florence2Config, Florence2VisionConfig
from core_jax.models.gemma3 import Gemma3Config
from core_jax.models.gemma3_text import Gemma3TextConfig
from core_jax.models.qwen2 import Qwen2Config
from core_jax.models.qwen2_5_vl import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLVisionConfig,
)
from core_jax.models.siglip import SiglipVisionConfig
from core_jax.models.unet import UNet2DConditionConfig

CHECKPOINTS = pathlib.Path(__file__).parent / "checkpoints"
PIPELINE, FLORENCE2 = "stable-diffusion", "florence2"
LANGUAGE_MODELS = ("qwen2.5-small", "qwen2.5-medium", "qwen2.5-large")
# Targets that see, and the language models that are made drafters of them.
QWEN2_5_VL, QWEN2_5_TEXT = "qwen2.5-vl", "qwen2.5-text"
GEMMA_3, GEMMA_3_TEXT = "gemma-3", "gemma-3-text"
TARGETS, TEXT_MODELS = (QWEN2_5_VL, GEMMA_3), (QWEN2_5_TEXT, GEMMA_3_TEXT)

CONTEXT_DIM = 128
LATENT_SIZE = 16  # latents are 16x16 for 64x64 images: 8x8 would blur the small shapes
LATENT_CHANNELS = 4


def vae_config(scaling_factor: float = 1.0) -> AutoencoderKLConfig:
    """A 4x downsampling autoencoder.

    Few groups: a group of one channel would forget the channel's mean, that is, the colour.
    """
    return AutoencoderKLConfig(
        block_out_channels=(8, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=2,
        sample_size=64,
        scaling_factor=scaling_factor,
    )


def unet_config() -> UNet2DConditionConfig:
    """Three resolutions, cross-attention at the lower two."""
    return UNet2DConditionConfig(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=CONTEXT_DIM,
        attention_head_dim=(1, 2, 4),
        norm_num_groups=16,
        use_linear_projection=True,
    )


def text_encoder_config(vocab_size: int, pad_id: int, bos_id: int, eos_id: int) -> CLIPTextConfig:
    """Three layers; 77 positions as everywhere."""
    return CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=CONTEXT_DIM,
        intermediate_size=4 * CONTEXT_DIM,
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_act="gelu",
        projection_dim=CONTEXT_DIM,
        pad_token_id=pad_id,
        bos_token_id=bos_id,
        eos_token_id=eos_id,
    )


def florence2_config(vocab_size: int, image_token_id: int) -> Florence2Config:
    """64-pixel pictures give an 8x8 grid, so 65 image tokens."""
    return Florence2Config(
        vision_config=Florence2VisionConfig(
            depths=(1, 1, 1, 1),
            patch_size=(7, 3, 3, 3),
            patch_stride=(4, 2, 1, 1),
            patch_padding=(3, 1, 1, 1),
            embed_dim=(64, 64, 96, 128),
            num_heads=(2, 2, 3, 4),
            num_groups=(2, 2, 3, 4),
            window_size=8,
            projection_dim=128,
            max_position_embeddings=16,
            max_temporal_embeddings=4,
        ),
        text_config=BartConfig(
            vocab_size=vocab_size,
            d_model=128,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=384,
            decoder_ffn_dim=384,
            max_position_embeddings=160,
        ),
        image_token_id=image_token_id,
    )


_LANGUAGE_MODEL_SIZES = {  # (width, layers, heads, key-value heads)
    "qwen2.5-small": (64, 2, 2, 1),
    "qwen2.5-medium": (128, 3, 4, 2),
    "qwen2.5-large": (192, 4, 6, 2),
}


def language_model_config(name: str, vocab_size: int, eos_id: int, pad_id: int) -> Qwen2Config:
    """One of the three sizes; tied heads, as Qwen2.5 has up to 3B."""
    width, layers, heads, kv_heads = _LANGUAGE_MODEL_SIZES[name]
    return Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        # Qwen2.5 has 1e6; of a head's 16 frequencies only four would then tell neighbours apart.
        rope_theta=1e4,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        bos_token_id=eos_id,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
    )


# Pictures of 64 pixels are enlarged to 72: a cell of a scene is then two by two image tokens.
TARGET_IMAGE_SIZE, TARGET_PATCH_SIZE = 72, 6
_SPARE_ROWS = 8  # released targets' tables are padded further than those of small language models


def qwen2_5_vl_config(tokenizer) -> Qwen2_5_VLConfig:
    """The language model is `qwen2.5-medium` with positions in three directions."""
    base = language_model_config(
        "qwen2.5-medium", len(tokenizer) + _SPARE_ROWS, tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )  # fmt: skip
    fields = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    text = Qwen2_5_VLTextConfig(**fields | {"eos_token_id": end}, mrope_section=(4, 6, 6))
    ids = {
        f"{name}_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image_token", "image_pad"), ("video_token", "video_pad"),
            ("vision_start_token", "vision_start"), ("vision_end_token", "vision_end"),
        )
    }  # fmt: skip
    vision = Qwen2_5_VLVisionConfig(
        depth=4, hidden_size=64, num_heads=2, intermediate_size=176,
        patch_size=TARGET_PATCH_SIZE, window_size=TARGET_IMAGE_SIZE // 2,
        out_hidden_size=text.hidden_size, fullatt_block_indexes=(1, 3),
    )  # fmt: skip
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)


QWEN2_5_VL_PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "min_pixels": TARGET_IMAGE_SIZE**2,
    "max_pixels": 4 * TARGET_IMAGE_SIZE**2,
    "patch_size": TARGET_PATCH_SIZE,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "resample": 3,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def _gemma_text_config(tokenizer, *, rows: int, width: int, layers: int, pattern: int):
    return Gemma3TextConfig(
        vocab_size=rows, hidden_size=width, intermediate_size=3 * width,
        num_hidden_layers=layers, num_attention_heads=width // 32, num_key_value_heads=1,
        head_dim=32, query_pre_attn_scalar=32, sliding_window=48,
        sliding_window_pattern=pattern, rope_theta=1e4, rope_local_base_freq=1e3,
        max_position_embeddings=1024, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=gemma_ends(tokenizer), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def gemma_ends(tokenizer) -> tuple[int, int]:
    """End of text, end of turn."""
    return (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>"))


def gemma_3_config(tokenizer) -> Gemma3Config:
    """Two local layers to a global one, where the released have five."""
    text = _gemma_text_config(
        tokenizer, rows=len(tokenizer) + _SPARE_ROWS, width=96, layers=3, pattern=3
    )
    return Gemma3Config(
        text_config=text,
        vision_config=SiglipVisionConfig(
            hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=2,
            image_size=TARGET_IMAGE_SIZE, patch_size=TARGET_PATCH_SIZE,
        ),
        mm_tokens_per_image=36,
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
        eos_token_id=gemma_ends(tokenizer),
    )  # fmt: skip


def gemma_3_text_config(tokenizer) -> Gemma3TextConfig:
    """As small as `qwen2.5-small`; its table ends before the placeholder of an image."""
    return _gemma_text_config(tokenizer, rows=len(tokenizer), width=64, layers=2, pattern=2)


GEMMA_3_PREPROCESSOR = {
    "image_processor_type": "Gemma3ImageProcessor",
    "do_pan_and_scan": None,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "resample": 2,
    "size": {"height": TARGET_IMAGE_SIZE, "width": TARGET_IMAGE_SIZE},
    "rescale_factor": 1 / 255,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "image_seq_length": 36,
}

FLORENCE2_PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_center_crop": False,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "resample": 3,
    "size": {"height": 64, "width": 64},
    "rescale_factor": 1 / 255,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def noise_schedule() -> NoiseSchedule:
    """Stable Diffusion's at 768 pixels, down to pure noise (arXiv 2305.08891).

    What a caption tells matters where little of the picture is left; predicting the noise, as SD
    at 512 pixels does, gives these steps next to no weight.
    """
    return NoiseSchedule.stable_diffusion(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
