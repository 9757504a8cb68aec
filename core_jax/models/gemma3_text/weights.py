"""Names of Gemma 3's text-only checkpoints."""

import jax
import jax.numpy as jnp

from core_jax.convert.rules import Pattern, Rename, WeightRules
from core_jax.models.family import Family
from core_jax.models.gemma3_text.config import GLOBAL, LOCAL, Gemma3TextConfig
from core_jax.models.gemma3_text.model import Gemma3ForCausalLM

# Local and global layers have the same parameters.
_LAYERS = r"(local|global)_layers"

PARAM_AXES = (
    (r"(embed_tokens|lm_head)/embedding", ("vocab", "embed")),
    (_LAYERS + r"/self_attn/q_proj/kernel", ("layers", "embed", "heads")),
    (_LAYERS + r"/self_attn/[kv]_proj/kernel", ("layers", "embed", "kv_heads")),
    (_LAYERS + r"/self_attn/o_proj/kernel", ("layers", "heads", "embed")),
    (_LAYERS + r"/self_attn/[qk]_norm/scale", ("layers", "norm")),
    (_LAYERS + r"/mlp/(gate|up)_proj/kernel", ("layers", "embed", "mlp")),
    (_LAYERS + r"/mlp/down_proj/kernel", ("layers", "mlp", "embed")),
    (_LAYERS + r"/\w+_layernorm/scale", ("layers", "norm")),
    (r"norm/scale", ("norm",)),
)


def layer_patterns(config: Gemma3TextConfig, prefix: str = "") -> tuple[Pattern, ...]:
    """Which layers of the checkpoint the stacks hold.

    Args:
      config: of the language model.
      prefix: path of the language model within a larger one, with its slash.
    """
    kinds = tuple(enumerate(config.layer_types))
    return tuple(
        Pattern(prefix + path, f"{prefix}layers", tuple(i for i, found in kinds if found == kind))
        for path, kind in (("local_layers", LOCAL), ("global_layers", GLOBAL))
    )


def _rename(name: str) -> str:
    return name if name.startswith("lm_head") else f"model.{name}"


def _rules(config: Gemma3TextConfig) -> WeightRules:
    tied = config.tie_word_embeddings
    return WeightRules(
        patterns=layer_patterns(config),
        rename=_rename,
        # A bare Gemma3TextModel is saved without the prefix.
        legacy=(Rename(r"^(?=(embed_tokens|layers|norm)\.)", "model."),),
        ignored=(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\S*\.inv_freq",),
        aliases=((r"lm_head\.weight", "model.embed_tokens.weight"),) if tied else (),
    )


FAMILY = Family(
    name="gemma3_text",
    config=Gemma3TextConfig,
    model=Gemma3ForCausalLM,
    example_inputs=lambda config: (jax.ShapeDtypeStruct((1, 2), jnp.int32),),
    rules=_rules,
    param_axes=PARAM_AXES,
)
