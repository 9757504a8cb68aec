"""Parameters that cost nothing to get: random, yet sized so that activations stay finite."""

import functools
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from core_jax.models.auto import family_of
from core_jax.partition import flatten, unflatten


def random_leaves(
    abstract: Mapping[str, Any], *, seed: int = 0, dtype: Any = jnp.float32, shardings: Any = None
) -> dict[str, Any]:
    """A tree of random arrays.

    Kernels have the variance of one over their inputs, scales are about 1, biases about 0.

    Args:
      abstract: nested dict of shapes.
      seed: a leaf depends on it and on its path only.
      dtype: of every leaf.
      shardings: tree like `abstract`: each leaf is made where it will live, by a compiled program
        (one for each shape). None makes them on the host, which compiles nothing; the numbers
        are others.
    """
    places = None if shardings is None else flatten(shardings)
    made = {}
    for path, leaf in flatten(abstract).items():
        number = zlib.crc32(path.encode())
        mean, std = _moments(path.rpartition("/")[2], leaf.shape)
        if places is None:
            rng = np.random.default_rng([seed, number])
            values = mean + std * rng.standard_normal(leaf.shape, np.float32)
            made[path] = jnp.asarray(values, dtype)
        else:
            key = jax.random.fold_in(jax.random.key(seed), number & 0x7FFFFFFF)
            make = _maker(leaf.shape, jnp.dtype(dtype), places[path])
            made[path] = make(key, mean, std)
    return unflatten(made)


@functools.cache
def _maker(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Any:
    def normal(key, mean, std):
        return (mean + std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    return jax.jit(normal, out_shardings=sharding)


def random_params(model: Any, *, on_device: bool = False, **options: Any) -> dict[str, Any]:
    """`random_leaves` for a model of one of the project's families.

    Args:
      model: Linen module.
      on_device: make them on the first device, not on the host.
      options: of `random_leaves`.
    """
    abstract = family_of(model).abstract_params(model)
    if on_device:
        place = SingleDeviceSharding(jax.devices()[0])
        options["shardings"] = jax.tree.map(lambda _: place, abstract)
    return random_leaves(abstract, **options)


def _moments(kind: str, shape: Sequence[int]) -> tuple[float, float]:
    """Mean and deviation of a leaf by its name."""
    if kind == "scale":
        return 1.0, 0.05
    if kind == "kernel":
        # [h, w, in, out] of a convolution, [in, out] of a layer, either with a layer axis.
        inputs = shape[-4:-1] if len(shape) >= 4 else (shape[-2],)
        return 0.0, math.prod(inputs) ** -0.5
    return 0.0, 0.05
