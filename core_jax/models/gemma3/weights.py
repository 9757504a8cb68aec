"""Names of Gemma 3's multimodal checkpoints."""

import jax
import jax.numpy as jnp

from core_jax.convert.rules import Rename, WeightRules
from core_jax.models.family import Family
from core_jax.models.gemma3.config import Gemma3Config
from core_jax.models.gemma3.model import Gemma3ForConditionalGeneration
from core_jax.models.gemma3_text.weights import PARAM_AXES as TEXT_AXES
from core_jax.models.gemma3_text.weights import layer_patterns
from core_jax.models.siglip.weights import PARAM_AXES as VISION_AXES
from core_jax.models.siglip.weights import rename as rename_vision

_TEXT, _VISION, _PROJECTOR = "language_model", "vision_tower", "multi_modal_projector"

PARAM_AXES = (
    *((f"{_TEXT}/{pattern}", axes) for pattern, axes in TEXT_AXES),
    *((f"{_VISION}/{pattern}", axes) for pattern, axes in VISION_AXES),
    (_PROJECTOR + r"/mm_input_projection_weight", (None, "embed")),
    (_PROJECTOR + r"/mm_soft_emb_norm/scale", ("norm",)),
)


def _rename(name: str) -> str:
    """The released layout, which transformers 5 reads and writes back."""
    part, _, rest = name.partition(".")
    if part == _VISION:
        return f"{part}.{rename_vision(rest)}"
    if part == _TEXT and not rest.startswith("lm_head"):
        return f"{part}.model.{rest}"
    return name


def _rules(config: Gemma3Config) -> WeightRules:
    tied = config.tie_word_embeddings
    return WeightRules(
        stacked=(f"{_VISION}/layers",),
        patterns=layer_patterns(config.text_config, f"{_TEXT}/"),
        rename=_rename,
        legacy=(
            # The names within transformers 5 (and 4.52 on): all below `model.`, the head outside.
            Rename(r"^model\.(?=vision_tower|multi_modal_projector)", ""),
            Rename(r"^model\.language_model\.", "language_model.model."),
            Rename(r"^lm_head\.", "language_model.lm_head."),
            # What it writes for a model that was built from a configuration.
            Rename(r"^vision_tower\.(?=embeddings|encoder|post_layernorm)",
                   "vision_tower.vision_model."),
        ),
        ignored=(
            r".*rotary_emb\S*\.inv_freq",
            r"(model\.)?vision_tower\.(vision_model\.)?embeddings\.position_ids",
        ),
        aliases=(
            (r"language_model\.lm_head\.weight", "language_model.model.embed_tokens.weight"),
        ) if tied else (),
    )  # fmt: skip


def _example_inputs(config: Gemma3Config) -> tuple:
    v = config.vision_config
    pixels = (1, v.image_size, v.image_size, v.num_channels)
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return ids, jax.ShapeDtypeStruct(pixels, jnp.float32)


FAMILY = Family(
    name="gemma3",
    config=Gemma3Config,
    model=Gemma3ForConditionalGeneration,
    example_inputs=_example_inputs,
    rules=_rules,
    param_axes=PARAM_AXES,
)
