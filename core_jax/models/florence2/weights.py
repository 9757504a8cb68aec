"""Names of Florence-2 checkpoints: transformers' layout and microsoft's remote-code layout."""

import dataclasses
import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from core_jax.convert.rules import Rename, WeightRules
from core_jax.models.family import Family
from core_jax.models.florence2.bart import POSITION_OFFSET
from core_jax.models.florence2.config import Florence2Config, Florence2VisionConfig
from core_jax.models.florence2.model import Florence2

_BLOCK = r"vision_tower/blocks_\d+/\w+"
_LAYERS = r"language_model/(encoder|decoder)/layers"

PARAM_AXES = (
    (r"vision_tower/convs_\d+/conv/kernel", (None, None, None, "channels_out")),
    (r"vision_tower/convs_\d+/(conv/bias|norm/(scale|bias))", ("norm",)),
    (_BLOCK + r"/conv[12]/kernel", ("layers", None, None, None, "channels_out")),
    (_BLOCK + r"/\w+_attn/qkv/kernel", ("layers", "embed", "heads")),
    (_BLOCK + r"/\w+_attn/qkv/bias", ("layers", "heads")),
    (_BLOCK + r"/\w+_attn/proj/kernel", ("layers", "heads", "embed")),
    (_BLOCK + r"/ffn/fc1/kernel", ("layers", "embed", "mlp")),
    (_BLOCK + r"/ffn/fc1/bias", ("layers", "mlp")),
    (_BLOCK + r"/ffn/fc2/kernel", ("layers", "mlp", "embed")),
    (_BLOCK + r"/(conv[12]/bias|norm[12]/(scale|bias)|\w+_attn/proj/bias|ffn/fc2/bias)",
     ("layers", "norm")),
    (r"multi_modal_projector/image_projection/kernel", (None, "embed")),
    (r"multi_modal_projector/image_position_embed/\w+/embedding", ("position", "embed")),
    (r"multi_modal_projector/image_proj_norm/(scale|bias)", ("norm",)),
    # The released vocabulary is an odd number; the other axis is the one to shard.
    (r"language_model/shared/embedding", (None, "embed")),
    (r"language_model/(encoder|decoder)/embed_positions/embedding", ("position", "embed")),
    (r"language_model/(encoder|decoder)/layernorm_embedding/(scale|bias)", ("norm",)),
    (_LAYERS + r"/\w+_attn/[qkv]_proj/kernel", ("layers", "embed", "heads")),
    (_LAYERS + r"/\w+_attn/[qkv]_proj/bias", ("layers", "heads")),
    (_LAYERS + r"/\w+_attn/out_proj/kernel", ("layers", "heads", "embed")),
    (_LAYERS + r"/fc1/kernel", ("layers", "embed", "mlp")),
    (_LAYERS + r"/fc1/bias", ("layers", "mlp")),
    (_LAYERS + r"/fc2/kernel", ("layers", "mlp", "embed")),
    (_LAYERS + r"/(\w+_attn/out_proj/bias|fc2/bias|\w+_norm/(scale|bias))", ("layers", "norm")),
)  # fmt: skip

# microsoft's names, part by part; an image projection is stored as x @ W uses it.
_REMOTE = (
    Rename(r"^vision_tower\.", "model.vision_tower."),
    Rename(r"\.convs\.(\d+)\.proj\.", r".convs.\1.conv."),
    Rename(r"\.(conv[12])\.fn\.dw\.", r".\1."),
    Rename(r"\.(window|channel)_attn\.norm\.", ".norm1."),
    Rename(r"\.(window|channel)_attn\.fn\.", r".\1_attn."),
    Rename(r"\.ffn\.norm\.", ".norm2."),
    Rename(r"\.ffn\.fn\.net\.", ".ffn."),
    Rename(r"^image_projection$", "model.multi_modal_projector.image_projection.weight",
           transpose=True),
    Rename(r"^image_proj_norm\.", "model.multi_modal_projector.image_proj_norm."),
    Rename(r"^image_pos_embed\.", "model.multi_modal_projector.image_position_embed."),
    Rename(r"^language_model\.model\.", "model.language_model."),
    Rename(r"^language_model\.lm_head\.", "lm_head."),
)  # fmt: skip


def _rules(config: Florence2Config) -> WeightRules:
    stages = range(len(config.vision_config.depths))
    return WeightRules(
        stacked=(
            *(f"vision_tower/blocks_{i}" for i in stages),
            "language_model/encoder/layers",
            "language_model/decoder/layers",
        ),
        rename=lambda name: f"model.{name}",
        legacy=_REMOTE,
        ignored=(r"visual_temporal_embed\.pos_idx_to_embed",),
        buffers=(
            (
                "model.multi_modal_projector.visual_temporal_embed.pos_idx_to_embed",
                lambda: _frame_table(config.vision_config),
            ),
        ),
        aliases=(
            (
                r"model\.language_model\.(encoder|decoder)\.embed_tokens\.weight|lm_head\.weight",
                "model.language_model.shared.weight",
            ),
        ),
        zeros=(r"(language_model\.)?final_logits_bias",),
    )


def _frame_table(config: Florence2VisionConfig) -> np.ndarray:
    """Sines and cosines for the frames of a video; an image uses row 0, which is 0, 1, 0, 1..."""
    half = config.embed_dim[-1] // 2
    frequencies = np.exp(np.arange(half) * (-math.log(10000) / half))
    angles = np.arange(config.max_temporal_embeddings)[:, None] * frequencies[None]
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(len(angles), -1)


def _adapt(config: Florence2Config, shapes: Mapping[str, tuple[int, ...]]) -> Florence2Config:
    """Takes the number of positions from the tables: released configurations disagree with them."""
    pattern = re.compile(r"(model\.)?language_model\.(model\.)?encoder\.embed_positions\.weight")
    rows = [shape[0] for name, shape in shapes.items() if pattern.fullmatch(name)]
    if len(rows) != 1:  # missing or doubled: the loader's own error says it better
        return config
    text = dataclasses.replace(
        config.text_config, max_position_embeddings=rows[0] - POSITION_OFFSET
    )
    return dataclasses.replace(config, text_config=text)


def _example_inputs(config: Florence2Config) -> tuple:
    channels = config.vision_config.in_channels
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return (jax.ShapeDtypeStruct((1, 64, 64, channels), jnp.float32), ids, ids)


FAMILY = Family(
    name="florence2",
    config=Florence2Config,
    model=Florence2,
    example_inputs=_example_inputs,
    rules=_rules,
    param_axes=PARAM_AXES,
    adapt=_adapt,
)
