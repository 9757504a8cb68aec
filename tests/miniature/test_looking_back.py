"""Heads of a fresh language model that look at the words just before."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_jax.models import qwen2
from core_jax.ops.rope import apply_rope, rope_angles
from miniature import standins
from miniature.pretrain.looking_back import FARTHEST, with_heads_that_look_back

T = 24


def _first_layer_attention(params, config):
    """float32 [N, T, T] on random words."""
    ids = jax.random.randint(jax.random.key(1), (1, T), 0, config.vocab_size)
    x = params["embed_tokens"]["embedding"][ids]
    x = x / jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True))
    weights = jax.tree.map(lambda w: w[0], params["layers"]["self_attn"])
    tables = rope_angles(jnp.arange(T)[None], head_dim=config.head_size, theta=config.rope_theta)
    q, k = (
        apply_rope(
            (x @ weights[name]["kernel"] + weights[name]["bias"][None, None]).reshape(
                1, T, -1, config.head_size
            ),
            *tables,
        )
        for name in ("q_proj", "k_proj")
    )
    k = jnp.repeat(k, config.num_attention_heads // config.num_key_value_heads, axis=2)
    logits = jnp.einsum("BTNH,BSNH->NTS", q, k) / jnp.sqrt(config.head_size)
    return jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((T, T), bool))[None], logits, -jnp.inf))


@pytest.mark.parametrize("name", standins.LANGUAGE_MODELS)
def test_every_head_looks_at_its_word(name):
    config = standins.language_model_config(name, 300, 1, 0)
    fresh = qwen2.FAMILY.init_params(qwen2.Qwen2ForCausalLM(config=config), jax.random.key(0))
    attention = _first_layer_attention(with_heads_that_look_back(fresh, config), config)
    without = _first_layer_attention(fresh, config)
    rows = np.arange(FARTHEST, T)
    for head in range(config.num_attention_heads):
        back = 1 + head % FARTHEST
        assert attention[head, rows, rows - back].mean() > 0.75
        assert without[head, rows, rows - back].mean() < 0.25


def test_later_layers_stay_as_they_are():
    config = standins.language_model_config("qwen2.5-medium", 300, 1, 0)
    fresh = qwen2.FAMILY.init_params(qwen2.Qwen2ForCausalLM(config=config), jax.random.key(0))
    changed = with_heads_that_look_back(fresh, config)
    assert jax.tree.structure(changed) == jax.tree.structure(fresh)
    for old, new in zip(
        jax.tree.leaves(fresh["layers"]), jax.tree.leaves(changed["layers"]), strict=True
    ):
        np.testing.assert_array_equal(old[1:], new[1:])
