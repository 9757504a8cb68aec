"""Names of Gemma 3's text-only checkpoints."""

import jax
import jax.numpy as jnp

from core_jax.convert.rules import Pattern, Rename, WeightRules
from core_jax.models.family import Family
from core_jax.models.gemma3_text.config import Gemma3TextConfig
from core_jax.models.gemma3_text.model import Gemma3ForCausalLM

# Local and global layers have the same parameters, and the last local ones lie in a stack of the
# same form, so one row serves all three.
_LAYERS = r"(layers/(local|global)|rest/local)"

PARAM_AXES = (
    (r"(embed_tokens|lm_head)/embedding", ("vocab", "embed")),
    (_LAYERS + r"/self_attn/q_proj/kernel", ("layers", None, "embed", "heads")),
    (_LAYERS + r"/self_attn/[kv]_proj/kernel", ("layers", None, "embed", "kv_heads")),
    (_LAYERS + r"/self_attn/o_proj/kernel", ("layers", None, "heads", "embed")),
    (_LAYERS + r"/self_attn/[qk]_norm/scale", ("layers", None, "norm")),
    (_LAYERS + r"/mlp/(gate|up)_proj/kernel", ("layers", None, "embed", "mlp")),
    (_LAYERS + r"/mlp/down_proj/kernel", ("layers", None, "mlp", "embed")),
    (_LAYERS + r"/\w+_layernorm/scale", ("layers", None, "norm")),
    (r"norm/scale", ("norm",)),
)


def layer_patterns(config: Gemma3TextConfig, prefix: str = "") -> tuple[Pattern, ...]:
    """Which layers of the checkpoint the stacks hold.

    Args:
      config: of the language model.
      prefix: path of the language model within a larger one, with its slash.
    """
    every, name = config.sliding_window_pattern, f"{prefix}layers"
    return (
        Pattern(f"{prefix}layers/local", name, 0, (every, 1)),
        Pattern(f"{prefix}layers/global", name, every - 1, (every, 1)),
        Pattern(f"{prefix}rest/local", name, config.patterns * every, (every, 1)),
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
