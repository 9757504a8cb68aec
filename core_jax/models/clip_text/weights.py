"""Names of CLIP text checkpoints."""

import jax
import jax.numpy as jnp

from core_jax.convert.rules import Rename, WeightRules
from core_jax.models.clip_text.config import CLIPTextConfig
from core_jax.models.clip_text.model import CLIPTextModel
from core_jax.models.family import Family

_EMBEDDINGS = ("token_embedding", "position_embedding")

PARAM_AXES = (
    (r"token_embedding/embedding", ("vocab", "embed")),
    (r"position_embedding/embedding", (None, "embed")),
    (r"layers/self_attn/[qkv]_proj/kernel", ("layers", "embed", "heads")),
    (r"layers/self_attn/[qkv]_proj/bias", ("layers", "heads")),
    (r"layers/self_attn/out_proj/kernel", ("layers", "heads", "embed")),
    (r"layers/mlp/fc1/kernel", ("layers", "embed", "mlp")),
    (r"layers/mlp/fc1/bias", ("layers", "mlp")),
    (r"layers/mlp/fc2/kernel", ("layers", "mlp", "embed")),
    (r"layers/(self_attn/out_proj|mlp/fc2)/bias", ("layers", None)),
    (r"layers/layer_norm[12]/(scale|bias)", ("layers", None)),
    (r"final_layer_norm/(scale|bias)", (None,)),
)


def _rename(name: str) -> str:
    """The hub's layout keeps `text_model.`; transformers reads both."""
    if name.startswith(_EMBEDDINGS):
        return f"text_model.embeddings.{name}"
    return f"text_model.{name.replace('layers.', 'encoder.layers.', 1)}"


def _rules(config: CLIPTextConfig) -> WeightRules:
    del config
    return WeightRules(
        stacked=("layers",),
        rename=_rename,
        # transformers 5 writes models that were built from a configuration without the prefix.
        legacy=(Rename(r"^(?=(embeddings|encoder|final_layer_norm)\.)", "text_model."),),
        # A buffer of old versions; the projection is only used for pooled outputs, which no
        # Stable Diffusion 1 or 2 needs.
        ignored=(r"(text_model\.)?embeddings\.position_ids", r"text_projection\.weight"),
    )


FAMILY = Family(
    name="clip_text",
    config=CLIPTextConfig,
    model=CLIPTextModel,
    example_inputs=lambda config: (jax.ShapeDtypeStruct((1, 2), jnp.int32),),
    rules=_rules,
    param_axes=PARAM_AXES,
)
