"""Decoding: the key-value cache, sampling rules, generation and beam search."""

from core_jax.decode.beam import beam_search
from core_jax.decode.cache import KVCache
from core_jax.decode.generate import Decoder, Generated, generate
from core_jax.decode.sampling import SamplingRule

__all__ = ["Decoder", "Generated", "KVCache", "SamplingRule", "beam_search", "generate"]
