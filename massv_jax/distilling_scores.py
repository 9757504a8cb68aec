"""What a target thinks of every token of an answer, from one reading of the answer."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from core_jax.decode.target import WindowDecoder

# Tokens read at a time: caches of local layers hold that many beyond their window.
PIECE = 8


def read_answer(
    decoder: WindowDecoder,
    params: Any,
    prompt: Any,
    vision: Any,
    tokens: Int[Array, "B N"],
    reduce: Any,
    *,
    piece: int = PIECE,
) -> Any:
    """`reduce(logits)` of every token of answers that are known.

    Args:
      decoder: the network.
      params: its parameters.
      prompt: what `begin` takes.
      vision: from `encode_images`, or None.
      tokens: answers; what follows an answer's end is read and means nothing.
      reduce: logits [B, T, V] (or what else `decoder` gives for a window) -> pytree of
        [B, T, ...], so that all logits are never held.
      piece: tokens read at a time.

    Returns:
      What `reduce` gives for all [B, N]: entry i belongs to the logits that chose token i.
    """
    B, N = tokens.shape
    pieces = -(-(N - 1) // piece)
    room = {"max_new_tokens": pieces * piece + 1, "window": piece - 1}
    logits, state = decoder.begin(params, prompt, vision, **room)
    first = reduce(jax.tree.map(lambda x: x[:, None], logits))
    if N == 1:
        return first
    fed = jnp.pad(tokens[:, :-1], ((0, 0), (0, pieces * piece - (N - 1))))
    fed = jnp.moveaxis(fed.reshape(B, pieces, piece), 1, 0)

    def read(state: Any, some: Int[Array, "B T"]) -> Any:
        logits, state = decoder.extend(params, state, some)
        return state, reduce(logits)

    _, rest = jax.lax.scan(read, state, fed)

    def joined(head: Array, tail: Array) -> Array:
        tail = jnp.moveaxis(tail, 0, 1)
        tail = tail.reshape(B, pieces * piece, *tail.shape[3:])[:, : N - 1]
        return jnp.concatenate([head, tail], axis=1)

    return jax.tree.map(joined, first, rest)


@functools.partial(jax.jit, static_argnames=("decoder", "k"))
def top_logprobs(
    decoder: WindowDecoder,
    params: Any,
    prompt: Any,
    images: Any,
    tokens: Int[Array, "B N"],
    *,
    k: int,
) -> tuple[Int[Array, "B N k"], Float[Array, "B N k"]]:
    """The k most likely tokens in each place of answers, and their log probabilities.

    Probabilities are unwarped: temperature 1, no limit.

    Args:
      decoder: the target.
      params: its parameters.
      prompt: what `begin` takes.
      images: what `encode_images` takes, or None.
      tokens: answers; see `read_answer`.
      k: how many.
    """
    vision = None if images is None else decoder.encode_images(params, images)

    def reduce(logits: Float[Array, "B T V"]) -> tuple[Array, Array]:
        logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        values, ids = jax.lax.top_k(logprobs, k)
        return ids.astype(jnp.int32), values

    return read_answer(decoder, params, prompt, vision, tokens, reduce)
