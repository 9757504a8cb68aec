"""A small Qwen2 of transformers' and ours, whose weights make it say many different things."""

import functools
import tempfile

import numpy as np
import pytest

from core_jax.models import load_model
from tests.oracle import randomize

VOCAB, PAD = 61, 1


@functools.cache
def tiny_qwen2(seed=0, std=0.3):
    """(transformers' model, ours, our parameters)."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        rope_parameters=dict(rope_type="default", rope_theta=1e4), bos_token_id=None,
        eos_token_id=None, pad_token_id=PAD, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    oracle = randomize(transformers.Qwen2ForCausalLM(config).eval(), seed=seed, std=std)
    with tempfile.TemporaryDirectory() as path:
        oracle.save_pretrained(path)
        return oracle, *load_model(path)


def prompts(batch=4, length=9, seed=0):
    """int32 [batch, length] without the padding token."""
    ids = np.random.default_rng(seed).integers(3, VOCAB, (batch, length))
    return ids.astype(np.int32)


def left_padded(batch=4, length=9, seed=0):
    """Prompts of different lengths, and which of their tokens are valid."""
    ids = prompts(batch, length, seed)
    pads = np.array([i * 2 % (length - 1) for i in range(batch)])
    valid = np.arange(length)[None] >= pads[:, None]
    return np.where(valid, ids, PAD).astype(np.int32), valid
