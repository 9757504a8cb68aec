"""Parameters that cost nothing to get: random, yet sized so that activations stay finite."""

import functools
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from core_jax.models.auto import family_of
from core_jax.partition import flatten, unflatten


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _normal(key, mean, std, shape, dtype):
    return (mean + std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def random_leaves(
    abstract: Mapping[str, Any], *, seed: int = 0, dtype: Any = jnp.float32, shardings: Any = None
) -> dict[str, Any]:
    """A tree of random arrays; each is made where it will live, a leaf at a time.

    Kernels have the variance of one over their inputs, scales are about 1, biases about 0.

    Args:
      abstract: nested dict of shapes.
      seed: a leaf depends on it and on its path only.
      dtype: of every leaf.
      shardings: tree like `abstract`; the default device if None.
    """
    places = {} if shardings is None else flatten(shardings)
    made = {}
    for path, leaf in flatten(abstract).items():
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()) & 0x7FFFFFFF)
        mean, std = _moments(path.rpartition("/")[2], leaf.shape)
        arguments = {"shape": leaf.shape, "dtype": jnp.dtype(dtype)}
        if path in places:
            make = jax.jit(
                functools.partial(_normal, **arguments), out_shardings=places[path]
            )
            made[path] = make(key, mean, std)
        else:
            made[path] = _normal(key, mean, std, **arguments)
    return unflatten(made)


def random_params(model: Any, **options: Any) -> dict[str, Any]:
    """`random_leaves` for a model of one of the project's families."""
    return random_leaves(family_of(model).abstract_params(model), **options)


def _moments(kind: str, shape: Sequence[int]) -> tuple[float, float]:
    """Mean and deviation of a leaf by its name."""
    if kind == "scale":
        return 1.0, 0.05
    if kind == "kernel":
        # [h, w, in, out] of a convolution, [in, out] of a layer, either with a layer axis.
        inputs = shape[-4:-1] if len(shape) >= 4 else (shape[-2],)
        return 0.0, math.prod(inputs) ** -0.5
    return 0.0, 0.05
