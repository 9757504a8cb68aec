"""Names of Qwen2 checkpoints."""

import jax
import jax.numpy as jnp

from core_jax.convert.rules import Rename, WeightRules
from core_jax.models.family import Family
from core_jax.models.qwen2.config import Qwen2Config
from core_jax.models.qwen2.model import Qwen2ForCausalLM

PARAM_AXES = (
    # An untied head has the table's form, so one row serves tied and untied models.
    (r"(embed_tokens|lm_head)/embedding", ("vocab", "embed")),
    (r"layers/self_attn/q_proj/kernel", ("layers", "embed", "heads")),
    (r"layers/self_attn/q_proj/bias", ("layers", "heads")),
    (r"layers/self_attn/[kv]_proj/kernel", ("layers", "embed", "kv_heads")),
    (r"layers/self_attn/[kv]_proj/bias", ("layers", "kv_heads")),
    (r"layers/self_attn/o_proj/kernel", ("layers", "heads", "embed")),
    (r"layers/mlp/(gate|up)_proj/kernel", ("layers", "embed", "mlp")),
    (r"layers/mlp/down_proj/kernel", ("layers", "mlp", "embed")),
    (r"layers/(input|post_attention)_layernorm/scale", ("layers", "norm")),
    (r"norm/scale", ("norm",)),
)


def _rename(name: str) -> str:
    return name if name.startswith("lm_head") else f"model.{name}"


def _rules(config: Qwen2Config) -> WeightRules:
    tied = config.tie_word_embeddings
    return WeightRules(
        stacked=("layers",),
        rename=_rename,
        # A bare Qwen2Model is saved without the prefix.
        legacy=(Rename(r"^(?=(embed_tokens|layers|norm)\.)", "model."),),
        ignored=(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
        aliases=((r"lm_head\.weight", "model.embed_tokens.weight"),) if tied else (),
    )


FAMILY = Family(
    name="qwen2",
    config=Qwen2Config,
    model=Qwen2ForCausalLM,
    example_inputs=lambda config: (jax.ShapeDtypeStruct((1, 2), jnp.int32),),
    rules=_rules,
    param_axes=PARAM_AXES,
)
