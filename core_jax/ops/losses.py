"""Losses, computed in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from core_jax.ops.matmul import matmul


def token_cross_entropy(
    logits: Float[Array, "... V"], targets: Int[Array, "..."]
) -> Float[Array, "..."]:
    """Negative log likelihood of each target, in nats."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def chunked_token_cross_entropy(
    hidden: Float[Array, "B T D"],
    table: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    *,
    chunk: int = 128,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """`token_cross_entropy(hidden @ table.T, targets)` without ever holding all the logits.

    The sequence is scanned `chunk` positions at a time, forward and backward, so that only
    [B, chunk, V] logits exist at once. The backward pass computes them a second time.

    Args:
      hidden: final hidden states.
      table: output head; a tied token table as it is.
      targets: next tokens; any valid id where the result is then masked.
      chunk: positions at a time; T need not be a multiple of it.

    Returns:
      Losses in nats, and whether each target was the most likely token.
    """
    B, T, D = hidden.shape
    chunk = min(chunk, T)
    count = -(-T // chunk)
    room = count * chunk - T
    hidden = jnp.pad(hidden, ((0, 0), (0, room), (0, 0))).reshape(B, count, chunk, D)
    targets = jnp.pad(targets, ((0, 0), (0, room))).reshape(B, count, chunk)

    @jax.checkpoint
    def one(_, piece):
        h, t = piece
        logits = matmul(h, table.T.astype(h.dtype))
        return None, (token_cross_entropy(logits, t), jnp.argmax(logits, axis=-1) == t)

    _, out = jax.lax.scan(one, None, (hidden.swapaxes(0, 1), targets.swapaxes(0, 1)))
    losses, correct = (x.swapaxes(0, 1).reshape(B, count * chunk)[:, :T] for x in out)
    return losses, correct


def masked_mean(values: Float[Array, "..."], mask: Bool[Array, "..."]) -> Float[Array, ""]:
    """Mean over the True positions; 0 where there is none."""
    weights = mask.astype(jnp.float32)
    return jnp.sum(values * weights) / jnp.maximum(jnp.sum(weights), 1.0)
