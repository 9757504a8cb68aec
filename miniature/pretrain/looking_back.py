"""A start for small language models: first-layer heads that look a few words back.

To look something up in a text, a head must find a word by the words before it, so an earlier layer
must have put these there. In a fresh network neither helps without the other, and both come late
(arXiv 2209.11895, "induction heads"). Here the earlier half is there from the start, by biases
alone: with rotary positions, the product of a query bias and a key bias depends on nothing but
how far apart the two words are.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from core_jax.models.qwen2 import Qwen2Config

FARTHEST = 4  # words back
# Of the biases: a look goes to its word with about nine tenths of its weight.
STRENGTH = 5.0
# Only the fastest frequencies tell neighbours apart.
FREQUENCIES = 4
# What the words themselves say to these heads, against a fresh layer's.
CONTENT = 0.2


def with_heads_that_look_back(params: Any, config: Qwen2Config) -> Any:
    """First-layer head i attends to the word 1 + i % 4 places before.

    Args:
      params: of a fresh Qwen2, layers stacked.
      config: its architecture.

    Returns:
      The same tree with other biases and smaller kernels in the first layer's queries and keys.
    """
    heads, kv_heads = config.num_attention_heads, config.kv_heads
    half = config.head_size // 2
    frequencies = config.rope_theta ** (-np.arange(FREQUENCIES) / half)
    key = np.zeros((kv_heads, 2, half), np.float32)
    key[:, 0, :FREQUENCIES] = STRENGTH
    query = np.zeros((heads, 2, half), np.float32)
    for head in range(heads):
        angle = -frequencies * (1 + head % FARTHEST)
        query[head, 0, :FREQUENCIES] = STRENGTH * np.cos(angle)
        query[head, 1, :FREQUENCIES] = STRENGTH * np.sin(angle)
    attention = params["layers"]["self_attn"]
    changed = {
        name: {
            "kernel": attention[name]["kernel"].at[0].multiply(CONTENT),
            "bias": attention[name]["bias"].at[0].set(jnp.asarray(bias.reshape(-1))),
        }
        for name, bias in (("q_proj", query), ("k_proj", key))
    }
    layers = {**params["layers"], "self_attn": {**attention, **changed}}
    return {**params, "layers": layers}
