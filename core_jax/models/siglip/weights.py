"""Names of SigLIP checkpoints."""

import jax
import jax.numpy as jnp

from core_jax.convert.rules import Rename, WeightRules
from core_jax.models.family import Family
from core_jax.models.siglip.config import SiglipVisionConfig
from core_jax.models.siglip.model import SiglipVisionModel

_EMBEDDINGS = ("patch_embedding", "position_embedding")

PARAM_AXES = (
    (r"patch_embedding/kernel", (None, None, None, "embed")),
    (r"position_embedding/embedding", ("position", "embed")),
    (r"layers/self_attn/[qkv]_proj/kernel", ("layers", "embed", "heads")),
    (r"layers/self_attn/[qkv]_proj/bias", ("layers", "heads")),
    (r"layers/self_attn/out_proj/kernel", ("layers", "heads", "embed")),
    (r"layers/mlp/fc1/kernel", ("layers", "embed", "mlp")),
    (r"layers/mlp/fc1/bias", ("layers", "mlp")),
    (r"layers/mlp/fc2/kernel", ("layers", "mlp", "embed")),
    (r"layers/(self_attn/out_proj|mlp/fc2)/bias", ("layers", "bias")),
    (r"layers/layer_norm[12]/(scale|bias)", ("layers", "norm")),
    (r"(post_layernorm/(scale|bias)|patch_embedding/bias)", ("norm",)),
)


def rename(name: str) -> str:
    """A derived name of the tower -> the hub's, which keeps `vision_model.`."""
    if name.startswith(_EMBEDDINGS):
        return f"vision_model.embeddings.{name}"
    return f"vision_model.{name.replace('layers.', 'encoder.layers.', 1)}"


def _rules(config: SiglipVisionConfig) -> WeightRules:
    del config
    return WeightRules(
        stacked=("layers",),
        rename=rename,
        # transformers 5 writes towers that were built from a configuration without the prefix.
        legacy=(Rename(r"^(?=(embeddings|encoder|post_layernorm|head)\.)", "vision_model."),),
        # A buffer of old versions, and the pooling head, which no language model looks through.
        ignored=(r"(vision_model\.)?embeddings\.position_ids", r"(vision_model\.)?head\..*"),
    )


FAMILY = Family(
    name="siglip",
    config=SiglipVisionConfig,
    model=SiglipVisionModel,
    example_inputs=lambda config: (
        jax.ShapeDtypeStruct(
            (1, config.image_size, config.image_size, config.num_channels), jnp.float32
        ),
    ),
    rules=_rules,
    param_axes=PARAM_AXES,
)
