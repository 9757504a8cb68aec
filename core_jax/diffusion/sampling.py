"""The sampling loop and classifier-free guidance; both only call functions they are given."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from core_jax.diffusion.samplers import Sampler

DenoiseFn = Callable[[jax.Array, jax.Array], jax.Array]


def sample(
    denoise_fn: DenoiseFn,
    sampler: Sampler,
    noise: Float[Array, "B ..."],
    key: jax.Array | None = None,
) -> Float[Array, "B ..."]:
    """Runs the whole reverse process as one `lax.scan`.

    Args:
        denoise_fn: (x [B, ...], t [B]) -> output of x's shape; x is already scaled for it.
        sampler: From `make_sampler`.
        noise: Unit Gaussian noise; it is multiplied by the sampler's `init_noise_sigma` here. Its
            dtype is that of the state; keep it float32 whatever the denoiser computes in.
        key: Random key of the noise added on the way, or one key per row, [B], so that a sample
            does not depend on its neighbours in the batch. Needed by stochastic samplers only.

    Returns:
        Clean samples, in noise's shape and dtype.

    Raises:
        ValueError: A stochastic sampler has no key.
    """
    if sampler.is_stochastic and key is None:
        raise ValueError(f"this {sampler.kind} sampler adds noise at every step; pass a key")
    timesteps = jnp.asarray(sampler.timesteps)

    def body(x, i):
        output = denoise_fn(sampler.scale_input(i, x), jnp.full(x.shape[:1], timesteps[i]))
        fresh = None
        if sampler.is_stochastic and key is not None:
            fresh = _noise_like(x, key, i)
        return sampler.step(i, output, x, fresh), None

    start = (noise * sampler.init_noise_sigma).astype(noise.dtype)
    return jax.lax.scan(body, start, jnp.arange(sampler.num_steps))[0]


def _noise_like(x: jax.Array, key: jax.Array, i: jax.Array) -> jax.Array:
    if key.ndim == 0:
        return jax.random.normal(jax.random.fold_in(key, i), x.shape, jnp.float32)
    if key.shape != x.shape[:1]:
        raise ValueError(f"keys have shape {key.shape}; one per row would be {x.shape[:1]}")
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(key, i)
    return jax.vmap(lambda row: jax.random.normal(row, x.shape[1:], jnp.float32))(keys)


def guided(
    denoise_fn: Callable[[jax.Array, jax.Array, Any], jax.Array],
    cond: Any,
    uncond: Any,
    scale: float | jax.Array,
) -> DenoiseFn:
    """Classifier-free guidance (Ho and Salimans, 2022): uncond + scale * (cond - uncond).

    Args:
        denoise_fn: (x [2B, ...], t [2B], context [2B, ...]) -> output; called once a step, the
            unconditional half first, as diffusers does.
        cond: Context, a pytree of arrays [B, ...].
        uncond: Context of the same structure; [1, ...] is repeated for the batch.
        scale: Guidance scale. The Python number 1 means no guidance and costs one half batch.

    Returns:
        A function for `sample`.
    """
    if isinstance(scale, int | float) and scale == 1:
        return lambda x, t: denoise_fn(x, t, cond)

    def stack(without: jax.Array, given: jax.Array) -> jax.Array:
        return jnp.concatenate([jnp.broadcast_to(without, given.shape), given])

    def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
        context = jax.tree.map(stack, uncond, cond)
        both = denoise_fn(jnp.concatenate([x, x]), jnp.concatenate([t, t]), context)
        without, given = jnp.split(both.astype(jnp.float32), 2)
        return without + scale * (given - without)

    return denoise
