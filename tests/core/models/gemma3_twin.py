"""Small Gemma 3 models of transformers', every tensor of them random, and ours read from them."""

import dataclasses
import functools
import pathlib
import tempfile
from typing import Any

import numpy as np
import pytest

from core_jax.models import load_model
from tests.oracle import randomize

VOCAB, PAD, BEGIN, END, WINDOW = 157, 0, 155, 156, 8

TEXT: dict[str, dict[str, Any]] = {
    # One pattern and a remainder; scaled global positions; an odd scale of the queries.
    "remainder": dict(hidden_size=64, intermediate_size=112, num_hidden_layers=8,
                      num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                      query_pre_attn_scalar=21, scaling=8.0),
    # Two patterns and none; one key-value head; H is not D / N.
    "whole": dict(hidden_size=48, intermediate_size=96, num_hidden_layers=12,
                  num_attention_heads=3, num_key_value_heads=1, head_dim=32,
                  query_pre_attn_scalar=32, scaling=None),
}  # fmt: skip
# Images of 70 pixels: 4 x 4 patches of 16 and a rest; 2 x 2 image tokens; E is not D.
VISION: dict[str, dict[str, Any]] = {
    "remainder": dict(hidden_size=32, intermediate_size=56, num_hidden_layers=2,
                      num_attention_heads=4, image_size=70, patch_size=16),
    # 6 x 6 patches, 3 x 3 image tokens.
    "whole": dict(hidden_size=40, intermediate_size=48, num_hidden_layers=3,
                  num_attention_heads=2, image_size=42, patch_size=7),
}  # fmt: skip
TOKENS = {"remainder": 4, "whole": 9}
# Outside the vocabulary (as for the 1B), and inside.
PLACEHOLDER = {"remainder": 160, "whole": 150}


def text_config(name):
    """transformers' configuration of a language model."""
    transformers = pytest.importorskip("transformers")
    fields = dict(TEXT[name])
    scaling = fields.pop("scaling")
    full = dict(rope_type="default") if scaling is None else dict(rope_type="linear",
                                                                  factor=scaling)  # fmt: skip
    return transformers.Gemma3TextConfig(
        vocab_size=VOCAB, sliding_window=WINDOW, max_position_embeddings=512, rms_norm_eps=1e-6,
        bos_token_id=2, eos_token_id=None, pad_token_id=PAD,
        rope_parameters=dict(
            full_attention=dict(rope_theta=1e6, **full),
            sliding_attention=dict(rope_type="default", rope_theta=1e4),
        ),
        **fields,
    )  # fmt: skip


@dataclasses.dataclass
class Twin:
    """transformers' model, the directory it was saved to, and ours."""

    oracle: Any
    path: pathlib.Path
    model: Any
    params: Any
    scratch: Any


def _twin(oracle, std):
    randomize(oracle.eval(), std=std)
    # A tied head finds large embeddings again, whatever the layers do: one word for ever.
    oracle.get_input_embeddings().weight.data.mul_(0.2)
    scratch = tempfile.TemporaryDirectory()
    path = pathlib.Path(scratch.name)
    oracle.save_pretrained(path)
    return Twin(oracle, path, *load_model(path), scratch)


@functools.cache
def text_twin(name, std=0.5):
    """A text-only model."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return _twin(transformers.Gemma3ForCausalLM(text_config(name)), std)


@functools.cache
def image_twin(name, std=0.5):
    """A model with a vision tower."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma3Config(
        text_config=text_config(name), vision_config=dict(vision_use_head=False, **VISION[name]),
        mm_tokens_per_image=TOKENS[name], boi_token_index=BEGIN, eoi_token_index=END,
        image_token_index=PLACEHOLDER[name],
    )  # fmt: skip
    torch.manual_seed(0)
    return _twin(transformers.Gemma3ForConditionalGeneration(config), std)


def text_ids(batch, length, seed=0):
    """int32 [batch, length] of ordinary tokens."""
    return np.random.default_rng(seed).integers(3, 140, (batch, length)).astype(np.int32)


def prompt(name, images, length, seed=0):
    """Ids [1, length] of a prompt with so many images, one after the other but for a few words."""
    ids = text_ids(1, length, seed)
    at = 3
    for _ in range(images):
        run = [BEGIN, *[PLACEHOLDER[name]] * TOKENS[name], END]
        ids[0, at : at + len(run)] = run
        at += len(run) + 2
    assert at < length
    return ids


def pixels(name, count, seed=0):
    """Normalised images, channels last."""
    side = VISION[name]["image_size"]
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, side, side, 3), np.float32)


def oracle_inputs(name, ids, images=None, valid=None):
    """What transformers' model takes."""
    torch = pytest.importorskip("torch")

    ids = torch.tensor(np.array(ids, np.int64))
    inputs = {"input_ids": ids}
    if images is not None:
        inputs["pixel_values"] = torch.tensor(np.array(images).transpose(0, 3, 1, 2))
    inputs["token_type_ids"] = (ids == PLACEHOLDER[name]).long()
    valid = np.ones(ids.shape, bool) if valid is None else valid
    inputs["attention_mask"] = torch.tensor(np.array(valid, np.int64))
    return inputs


def oracle_logits(twin, **inputs):
    """transformers' logits as an array."""
    torch = pytest.importorskip("torch")

    with torch.no_grad():
        return twin.oracle(**inputs).logits.numpy()
