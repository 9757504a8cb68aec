"""Targets that see and drafters for them: of random weights that agree, or the user's own.

A random drafter's guesses are never right, so nothing could be said about speed. Here the target
has the drafter's layers, and further ones whose residual branches end in zeros (miniature.grow):
it computes the same function at several times the cost. Noise in the drafter's weights makes it
err as often as one likes.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairSize:
    """A target of Qwen2.5-VL's architecture and a drafter of Qwen2's.

    Attributes:
      width: of both language models.
      intermediate_size: of their MLPs.
      heads, kv_heads: of their attention.
      layers: of the target.
      draft_layers: of the drafter; the target's first ones.
      vocab_size: rows of the token tables.
    """

    width: int
    intermediate_size: int
    heads: int
    kv_heads: int
    layers: int
    draft_layers: int
    vocab_size: int


SIZES = {
    "tiny": PairSize(
        width=32, intermediate_size=48, heads=2, kv_heads=1, layers=3, draft_layers=1,
        vocab_size=1024,
    ),
    # 43 and 16 million parameters.
    "larger": PairSize(
        width=512, intermediate_size=2048, heads=8, kv_heads=2, layers=10, draft_layers=3,
        vocab_size=8192,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Pair:
    """Hub directories; the drafter's is an exported stock one."""

    target: pathlib.Path
    drafter: pathlib.Path


def write_random_pair(folder: pathlib.Path, size: PairSize, *, noise: float, seed: int = 0) -> Pair:
    """Writes a pair whose greedy answers agree but for the noise.

    Args:
      folder: receives `target` and `drafter`.
      size: of both.
      noise: standard deviation of what is added to each of the drafter's matrices, in units of
        the matrix's own.
      seed: of weights and noise.
    """
    from benchmarks.random_weights import random_params
    from core_jax.models import qwen2, qwen2_5_vl, save_model
    from massv_jax.companions import copy_companions
    from massv_jax.drafter import LANGUAGE_MODEL, PROJECTOR
    from massv_jax.exporting import export_drafter
    from massv_jax.loading import make_drafter
    from miniature import standins
    from miniature.grow import grow
    from miniature.tokenizers import build_tokenizers

    tokens = build_tokenizers(folder / "tokenizers")["qwen2-chat"]
    config = _target_config(tokens, size)
    base = qwen2_5_vl.Qwen2_5_VLForConditionalGeneration(config=config)
    params = random_params(base, seed=seed)
    model, grown = grow(
        base, params, layers=size.layers, intermediate_size=size.intermediate_size
    )
    target, language_model = folder / "target", folder / "language_model"
    save_model(target, model, grown)
    text = config.text_config
    fields = {f.name: getattr(text, f.name) for f in dataclasses.fields(qwen2.Qwen2Config)}
    small = qwen2.Qwen2ForCausalLM(config=qwen2.Qwen2Config(**fields))
    save_model(language_model, small, params["language_model"])
    for path in (target, language_model):
        copy_companions(tokens, path)
    (target / "preprocessor_config.json").write_text(json.dumps(standins.QWEN2_5_VL_PREPROCESSOR))
    parts = make_drafter(target, language_model, kind="merger")
    agreeing = {
        PROJECTOR: params["visual"]["merger"],
        LANGUAGE_MODEL: _with_noise(parts.params[LANGUAGE_MODEL], noise, seed),
    }
    export_drafter(dataclasses.replace(parts, params=agreeing), folder / "drafter", target)
    return Pair(target, folder / "drafter")


def _target_config(tokens: pathlib.Path, size: PairSize) -> Any:
    """Without an end token, so that every answer is as long as allowed."""
    from transformers import AutoTokenizer

    from miniature import standins

    config = standins.qwen2_5_vl_config(AutoTokenizer.from_pretrained(tokens))
    half = size.width // size.heads // 2
    text = dataclasses.replace(
        config.text_config, hidden_size=size.width, intermediate_size=size.intermediate_size,
        num_attention_heads=size.heads, num_key_value_heads=size.kv_heads,
        num_hidden_layers=size.draft_layers, vocab_size=size.vocab_size, eos_token_id=None,
        mrope_section=(half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8),
    )  # fmt: skip
    vision = dataclasses.replace(config.vision_config, out_hidden_size=size.width)
    return dataclasses.replace(config, text_config=text, vision_config=vision)


def _with_noise(params: Mapping[str, Any], noise: float, seed: int) -> dict[str, Any]:
    from core_jax.partition import flatten, unflatten

    rng = np.random.default_rng(seed + 1)
    noisy = {}
    for name, leaf in flatten(params).items():
        x = np.asarray(leaf, np.float32)
        spread = noise * x.std() if name.endswith("kernel") else 0.0
        noisy[name] = x + spread * rng.standard_normal(x.shape, np.float32)
    return unflatten(noisy)


def pictures(count: int) -> np.ndarray:
    """Scenes of the miniature world, uint8 [count, 64, 64, 3]."""
    from miniature.world import render, sample_scene

    return np.stack([render(sample_scene(0, index, "heldout")) for index in range(count)])
