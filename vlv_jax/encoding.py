"""Image -> features -> caption embeddings z -> context c = T(z); pure functions.

arXiv 2507.07104, sections 3.2 and 3.3. Equation 1 writes the UNet's condition as z; the released
code and figure 2 condition on T(z), and so do we.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from core_jax.models.autoencoder_kl import sample_latents, scale_latents
from vlv_jax.networks import BRIDGE, FLORENCE2, TEXT_ENCODER, UNET, VAE, Networks

Params = Mapping[str, Any]


def image_features(
    networks: Networks, params: Params, pixels: UInt8[Array, "B H W 3"]
) -> Float[Array, "B P D"]:
    """Florence-2's projected image tokens, v' in the paper; everything here is frozen.

    Args:
      networks: the modules.
      params: needs 'florence2'.
      pixels: 0..255 at Florence-2's input size.
    """
    mean = jnp.asarray(networks.image_mean, jnp.float32)[None, None, None]
    std = jnp.asarray(networks.image_std, jnp.float32)[None, None, None]
    x = (pixels.astype(jnp.float32) / 255.0 - mean) / std
    features = networks.florence2.apply({"params": params[FLORENCE2]}, x, method="encode_image")
    return jax.lax.stop_gradient(features)


def caption_embeddings(
    networks: Networks, params: Params, features: Float[Array, "B P D"]
) -> Float[Array, "B Q E"]:
    """Z = phi(Dec(q, Enc([v'; t_prompt]))).

    The decoder is causal over the queries: query i sees queries 0..i.
    """
    florence2, weights = networks.florence2, {"params": params[FLORENCE2]}
    bridge = {"params": params[BRIDGE]}
    B = features.shape[0]
    prompt_ids = jnp.asarray(networks.prompt_ids, jnp.int32)[None]
    prompt = florence2.apply(weights, prompt_ids, method="embed_tokens")
    prompt = jnp.broadcast_to(prompt, (B, *prompt.shape[1:])).astype(features.dtype)
    states = florence2.apply(weights, jnp.concatenate([features, prompt], axis=1), method="encode")
    queries = networks.bridge.apply(bridge, method="queries")[None]
    queries = jnp.broadcast_to(queries, (B, *queries.shape[1:]))
    hidden = florence2.apply(weights, queries, states, method="decode")
    return networks.bridge.apply(bridge, hidden, method="project")


def context_of(
    networks: Networks, params: Params, z: Float[Array, "B Q E"]
) -> Float[Array, "B Q E"]:
    """C = T(z)."""
    return networks.text_encoder.apply(
        {"params": params[TEXT_ENCODER]}, z, method="from_embeddings"
    )


def context_of_text(networks: Networks, params: Params, ids: Array) -> Float[Array, "B T E"]:
    """T on token ids [B, T], as the diffusion pipeline itself conditions."""
    return networks.text_encoder.apply({"params": params[TEXT_ENCODER]}, ids)


def empty_context(networks: Networks, params: Params, length: int) -> Float[Array, "1 T E"]:
    """The unconditional context. T is causal, so its first `length` rows do not need the rest."""
    ids = jnp.asarray(networks.empty_ids[:length], jnp.int32)[None]
    return context_of_text(networks, params, ids)


def latent_moments(
    networks: Networks, params: Params, pixels: UInt8[Array, "B H W 3"]
) -> tuple[Float[Array, "B h w c"], Float[Array, "B h w c"]]:
    """Mean and log variance of the VAE's posterior, before scaling."""
    vae = networks.vae
    x = pixels.astype(jnp.float32) / 255.0 * 2.0 - 1.0
    mean, logvar = vae.apply({"params": params[VAE]}, x, method="encode")
    return jax.lax.stop_gradient(mean), jax.lax.stop_gradient(logvar)


def draw_latents(
    networks: Networks, mean: Float[Array, "B h w c"], logvar: Float[Array, "B h w c"], keys: Array
) -> Float[Array, "B h w c"]:
    """A scaled sample x0 of the posterior, with one key for each image."""
    sample = jax.vmap(lambda m, v, k: sample_latents(m[None], v[None], k)[0])
    latents = sample(mean.astype(jnp.float32), logvar.astype(jnp.float32), keys)
    return scale_latents(latents, networks.vae.config)


def predict_noise(
    networks: Networks, params: Params, x: Array, t: Array, context: Array
) -> Float[Array, "B h w c"]:
    """The frozen UNet's output, float32."""
    out = networks.unet.apply({"params": params[UNET]}, x, t, context)
    return out.astype(jnp.float32)
