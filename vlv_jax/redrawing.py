"""Caption embeddings -> images, by the frozen diffusion model.

Released code: `generate_images` (ancestral DDPM, 50 steps, guidance 2.0).
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from core_jax.config import ConfigError
from core_jax.diffusion.samplers import make_sampler
from core_jax.diffusion.sampling import guided, sample
from core_jax.models.autoencoder_kl import unscale_latents
from vlv_jax.encoding import context_of, empty_context, predict_noise
from vlv_jax.experiment import SamplingConfig
from vlv_jax.networks import VAE, Networks

Params = Mapping[str, Any]


def compose(
    first: Float[Array, "B Q E"], second: Float[Array, "B Q E"], *, num_first: int, num_second: int
) -> Float[Array, "B R E"]:
    """The leading embeddings of two images, one after the other (paper, section 4.4.2).

    Raises:
      ConfigError: more embeddings asked for than there are.
    """
    for name, z, count in (("first", first, num_first), ("second", second, num_second)):
        if not 0 < count <= z.shape[1]:
            raise ConfigError(
                f"the {name} image has {z.shape[1]} embeddings; {count} of them is not possible "
                f"(num_{name})"
            )
    return jnp.concatenate([first[:, :num_first], second[:, :num_second]], axis=1)


def redraw(
    networks: Networks,
    params: Params,
    context: Float[Array, "B S E"],
    key: jax.Array,
    config: SamplingConfig,
    *,
    latent_size: tuple[int, int],
) -> UInt8[Array, "B H W 3"]:
    """Samples images for contexts c = T(z) (or T of token ids).

    Args:
      networks: with UNet and VAE.
      params: 'unet', 'vae', 'text_encoder'.
      context: one for each image.
      key: row i draws from fold_in(key, i), whatever the batch is.
      config: sampler, steps, guidance.
      latent_size: (h, w) of the latents.
    """
    return _redraw(networks, params, context, key, config, latent_size)


@functools.partial(jax.jit, static_argnames=("networks", "config", "latent_size"))
def _redraw(networks, params, context, key, config, latent_size):
    B = context.shape[0]
    channels = networks.unet.config.in_channels
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(B))
    pairs = jax.vmap(jax.random.split)(keys)
    noise = jax.vmap(lambda k: jax.random.normal(k, (*latent_size, channels)))(pairs[:, 0])
    empty = empty_context(networks, params, context.shape[1]).astype(context.dtype)
    denoise = guided(
        functools.partial(predict_noise, networks, params), context, empty, config.guidance
    )
    sampler = make_sampler(networks.schedule, config.sampler, config.num_steps)
    latents = sample(denoise, sampler, noise, pairs[:, 1] if sampler.is_stochastic else None)
    return decode_latents(networks, params, latents)


def decode_latents(
    networks: Networks, params: Params, latents: Float[Array, "B h w c"]
) -> UInt8[Array, "B H W 3"]:
    """Scaled latents to pixels."""
    vae = networks.vae
    images = vae.apply(
        {"params": params[VAE]}, unscale_latents(latents, vae.config), method="decode"
    )
    pixels = (images.astype(jnp.float32) / 2.0 + 0.5).clip(0.0, 1.0)
    return jnp.round(pixels * 255.0).astype(jnp.uint8)


def redraw_embeddings(
    networks: Networks,
    params: Params,
    z: Float[Array, "B Q E"],
    key: jax.Array,
    config: SamplingConfig,
    *,
    latent_size: tuple[int, int],
) -> UInt8[Array, "B H W 3"]:
    """`redraw` from caption embeddings."""
    return redraw(
        networks, params, context_of(networks, params, z), key, config, latent_size=latent_size
    )
