"""Images -> captions: encode, project, generate; nothing but the embeddings prompts the LLM."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
from transformers import PreTrainedTokenizerBase

from core_jax.decode.adapters import CausalDecoder, EmbeddingPrefix
from core_jax.decode.beam import beam_search
from core_jax.decode.generate import Generated, generate
from core_jax.decode.sampling import SamplingRule
from vlv_jax.encoding import caption_embeddings, context_of, image_features
from vlv_jax.experiment import SamplingConfig
from vlv_jax.networks import LANGUAGE_MODEL, Networks
from vlv_jax.stage2 import prefix_embeddings

Params = Mapping[str, Any]


@functools.partial(jax.jit, static_argnames=("networks",))
def prefix_of_images(networks: Networks, params: Params, pixels: jax.Array) -> jax.Array:
    """The language model's prompt e [B, Q, D] for uint8 Florence-2 views [B, H, W, 3]."""
    z = caption_embeddings(networks, params, image_features(networks, params, pixels))
    return prefix_embeddings(networks, params, context_of(networks, params, z))


def generate_captions(
    networks: Networks,
    params: Params,
    prefix: jax.Array,
    config: SamplingConfig,
    *,
    eos_id: int,
    pad_id: int,
    key: jax.Array | None = None,
    row_seeds: jax.Array | None = None,
) -> Generated:
    """Token ids of captions for prompts [B, Q, D].

    Args:
      networks: with the language model.
      params: needs 'language_model'.
      prefix: from `prefix_of_images`.
      config: beams, temperature, length.
      eos_id: ends a caption.
      pad_id: fills rows after their end.
      key: needed where temperature > 0.
      row_seeds: a number for each row, which its samples are keyed by.
    """
    decoder = CausalDecoder(networks.language_model)
    options: dict[str, Any] = {
        "max_new_tokens": config.max_new_tokens, "eos_ids": eos_id, "pad_id": pad_id,
    }  # fmt: skip
    weights = params[LANGUAGE_MODEL]
    if config.num_beams > 1:
        if config.temperature > 0:
            raise ValueError(
                "sampling.num_beams > 1 and sampling.temperature > 0 exclude each other"
            )
        return beam_search(
            decoder, weights, EmbeddingPrefix(prefix), num_beams=config.num_beams,
            early_stopping=True, **options,
        )  # fmt: skip
    rule = SamplingRule(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
    return generate(
        decoder, weights, EmbeddingPrefix(prefix), rule=rule, key=key, row_seeds=row_seeds,
        **options,
    )  # fmt: skip


def decode_texts(tokenizer: PreTrainedTokenizerBase, generated: Generated) -> list[str]:
    """Captions as text; special tokens are left out."""
    tokens, lengths = jax.device_get((generated.tokens, generated.lengths))
    return [
        tokenizer.decode(row[:n].tolist(), skip_special_tokens=True).strip()
        for row, n in zip(tokens, lengths, strict=True)
    ]
