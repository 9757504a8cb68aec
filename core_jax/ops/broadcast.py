"""Explicit rank matching; implicit rank promotion is an error in our tests."""

import jax
from jaxtyping import Array, Shaped


def match_rank(vector: Shaped[Array, " D"], x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """Reshapes a vector to [1, ..., 1, D] so that it lines up with the last axis of `x`."""
    return jax.lax.expand_dims(vector, tuple(range(x.ndim - 1)))
