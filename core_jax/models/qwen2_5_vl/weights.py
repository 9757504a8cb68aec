"""Names of Qwen2.5-VL checkpoints."""

import jax
import jax.numpy as jnp

from core_jax.convert.rules import Rename, WeightRules
from core_jax.models.family import Family
from core_jax.models.qwen2.weights import PARAM_AXES as TEXT_AXES
from core_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from core_jax.models.qwen2_5_vl.model import Qwen2_5_VLForConditionalGeneration

_BLOCKS = r"visual/blocks/"

PARAM_AXES = (
    *((f"language_model/{pattern}", axes) for pattern, axes in TEXT_AXES),
    (r"visual/patch_embed/proj/kernel", ("channels_out", None, None, None, None)),
    # Queries, keys and values share one product, so its columns are not heads alone.
    (_BLOCKS + r"attn/qkv/kernel", ("layers", "embed", "mlp")),
    (_BLOCKS + r"attn/qkv/bias", ("layers", "mlp")),
    (_BLOCKS + r"attn/proj/kernel", ("layers", "heads", "embed")),
    (_BLOCKS + r"mlp/(gate|up)_proj/kernel", ("layers", "embed", "mlp")),
    (_BLOCKS + r"mlp/(gate|up)_proj/bias", ("layers", "mlp")),
    (_BLOCKS + r"mlp/down_proj/kernel", ("layers", "mlp", "embed")),
    (_BLOCKS + r"(attn/proj|mlp/down_proj)/bias", ("layers", "bias")),
    (_BLOCKS + r"norm[12]/scale", ("layers", "norm")),
    (r"visual/merger/ln_q/scale", ("norm",)),
    (r"visual/merger/mlp_0/kernel", ("embed", "mlp")),
    (r"visual/merger/mlp_0/bias", ("mlp",)),
    (r"visual/merger/mlp_2/kernel", ("mlp", "embed")),
    (r"visual/merger/mlp_2/bias", ("bias",)),
)


def _rename(name: str) -> str:
    """Released names: the text model is `model.`, the tower `visual.`."""
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    return name.replace("language_model.", "model.", 1)


def _rules(config: Qwen2_5_VLConfig) -> WeightRules:
    tied = config.text_config.tie_word_embeddings
    return WeightRules(
        stacked=("visual/blocks", "language_model/layers"),
        rename=_rename,
        # transformers 4.52 and later name their modules so; some of their files do as well.
        legacy=(
            Rename(r"^model\.visual\.", "visual."),
            Rename(r"^(model\.)?language_model\.", "model."),
        ),
        ignored=(r".*rotary(_pos)?_emb\.inv_freq",),
        aliases=((r"lm_head\.weight", "model.embed_tokens.weight"),) if tied else (),
    )


def _example_inputs(config: Qwen2_5_VLConfig) -> tuple[jax.ShapeDtypeStruct, ...]:
    slots, values = config.vision_config.window_patches, config.vision_config.patch_values
    shapes = [((1, 2), jnp.int32), ((3, 1, 2), jnp.int32), ((1, 2), jnp.int32),
              ((1, slots, values), jnp.float32), ((1, slots, 2), jnp.int32),
              ((1, slots), jnp.int32)]  # fmt: skip
    return tuple(jax.ShapeDtypeStruct(*shape) for shape in shapes)


FAMILY = Family(
    name="qwen2_5_vl",
    config=Qwen2_5_VLConfig,
    model=Qwen2_5_VLForConditionalGeneration,
    example_inputs=_example_inputs,
    rules=_rules,
    param_axes=PARAM_AXES,
)
