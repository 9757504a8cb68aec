"""The losses of the text-to-image stand-in: its autoencoder's, and its UNet's."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from core_jax.diffusion.schedule import NoiseSchedule, add_noise, training_target
from core_jax.models.autoencoder_kl import AutoencoderKL, sample_latents
from core_jax.models.clip_text import CLIPTextModel
from core_jax.models.unet import UNet2DConditionModel

KL_WEIGHT = 1e-5  # as latent diffusion's (arXiv 2112.10752): only keeps the latents bounded
CONDITION_DROPOUT = 0.1  # what classifier-free guidance needs (arXiv 2207.12598)


def make_vae_loss(vae: AutoencoderKL) -> Callable:
    """Absolute plus squared pixel error and a small KL term."""

    def loss(params, frozen, batch, key):
        del frozen
        x = batch["image"].astype(jnp.float32) / 127.5 - 1.0
        mean, logvar = vae.apply({"params": params}, x, method="encode")
        redrawn = vae.apply({"params": params}, sample_latents(mean, logvar, key), method="decode")
        error = redrawn - x
        kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)
        mse = jnp.mean(jnp.square(error))
        value = jnp.mean(jnp.abs(error)) + mse + KL_WEIGHT * kl
        return value, {"mse": mse, "kl": kl}

    return loss


def make_diffusion_loss(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    schedule: NoiseSchedule,
    *,
    scaling_factor: float,
    empty_ids: tuple[int, ...],
) -> Callable:
    """Denoising of scaled latents given a caption; the text encoder is frozen, as SD's is."""

    def loss(params, frozen, batch, key):
        k_t, k_noise, k_drop, k_latent = jax.random.split(key, 4)
        latents = batch["latent_mean"] + jnp.exp(0.5 * batch["latent_logvar"]) * jax.random.normal(
            k_latent, batch["latent_mean"].shape
        )
        latents = latents * scaling_factor
        B = latents.shape[0]
        keep = jax.random.uniform(k_drop, (B,)) >= CONDITION_DROPOUT
        ids = jnp.where(
            keep[:, None],
            batch["token_ids"].astype(jnp.int32),
            jnp.asarray(empty_ids, jnp.int32)[None],
        )
        context = text_encoder.apply({"params": frozen}, ids)
        t = jax.random.randint(k_t, (B,), 0, schedule.num_train_timesteps)
        noise = jax.random.normal(k_noise, latents.shape)
        noisy = add_noise(schedule, latents, noise, t)
        target = training_target(schedule, latents, noise, t)
        predicted = unet.apply({"params": params}, noisy, t, context)
        return jnp.mean(jnp.square(predicted - target)), {}

    return loss
