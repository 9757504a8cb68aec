"""Stage 1: the bottleneck learns to make the frozen diffusion model redraw the image.

arXiv 2507.07104, section 3.2 and equation 1. Released code: models/VLV_stage1.py.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from core_jax.config import ConfigError
from core_jax.diffusion.schedule import add_noise, min_snr_weight, training_target
from vlv_jax.encoding import (
    caption_embeddings,
    context_of,
    draw_latents,
    empty_context,
    image_features,
    latent_moments,
    predict_noise,
)
from vlv_jax.networks import Networks

# Section 4.3 of the specification: BART's layers, position tables and embedding norms, the
# queries and phi. Not the shared token table, the tower, the projection head, T, VAE or UNet.
TRAINABLE = (r"florence2/language_model/(encoder|decoder)/.*", r"bridge/.*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenoisingConfig:
    """The denoising objective; the defaults are the paper's.

    Attributes:
      loss: "mse", or "l1" (a dormant option of the released code).
      condition_dropout: probability that an example's context is the empty caption's.
      min_snr_gamma: loss weights min(SNR, gamma) / SNR of arXiv 2303.09556; None: no weights.
      min_timestep: the smallest timestep drawn, of 0 .. T-1. At small ones the noisy latent shows
        nearly everything, so that the context, and the bottleneck behind it, learns little.
      max_timestep: the largest timestep drawn; None: the schedule's last.
      draws_per_image: K, timesteps and noises for each image of a step; 1 is the paper's. The
        timesteps of an image lie evenly apart (the low-discrepancy draws of arXiv 2107.00630,
        appendix I.1, within an image), so the gradient is less noisy for the UNet's work alone:
        the image is encoded once.
    """

    loss: str = "mse"
    condition_dropout: float = 0.0
    min_snr_gamma: float | None = None
    min_timestep: int = 0
    max_timestep: int | None = None
    draws_per_image: int = 1

    def __post_init__(self):
        if self.loss not in ("mse", "l1"):
            raise ValueError(f"denoising.loss is {self.loss!r}; it must be 'mse' or 'l1'")
        if not 0 <= self.condition_dropout < 1:
            raise ValueError("denoising.condition_dropout must be in [0, 1)")
        if self.min_snr_gamma is not None and self.min_snr_gamma <= 0:
            raise ValueError("denoising.min_snr_gamma must be positive or None")
        if self.min_timestep < 0:
            raise ValueError("denoising.min_timestep must be 0 or more")
        if self.max_timestep is not None and self.max_timestep < self.min_timestep:
            raise ValueError(
                f"denoising.max_timestep {self.max_timestep} is below min_timestep "
                f"{self.min_timestep}"
            )
        if self.draws_per_image < 1:
            raise ValueError("denoising.draws_per_image must be 1 or more")


@dataclasses.dataclass(frozen=True)
class Draws:
    """The random numbers of one step, one independent stream for each example.

    They depend on (seed, step, example) only: not on the batch's order, its split into
    micro-batches or devices, nor on whether features were cached. M = B * draws_per_image; the
    draws of an image follow one another.
    """

    timesteps: Int[Array, " M"]
    noise: Float[Array, "M h w c"]
    latent_keys: Array
    keep_condition: Array


def draw(
    networks: Networks, config: DenoisingConfig, key: jax.Array, index: Array, shape: tuple
) -> Draws:
    """Draws timesteps, noise, VAE keys and condition dropout.

    Args:
      networks: for the schedule's length.
      config: the objective.
      key: of the step.
      index: int32 [B], which example each row is.
      shape: of one latent, (h, w, c).

    Raises:
      ConfigError: `min_timestep` lies outside the schedule.
    """
    steps = networks.schedule.num_train_timesteps
    if config.min_timestep >= steps:
        raise ConfigError(
            f"denoising.min_timestep must be below the schedule's {steps} steps, and is "
            f"{config.min_timestep}"
        )

    last = steps - 1 if config.max_timestep is None else min(config.max_timestep, steps - 1)
    K, span = config.draws_per_image, last + 1 - config.min_timestep
    apart = jnp.arange(K) * span // K

    def one(i):
        k_t, k_noise, k_latent, k_drop = jax.random.split(jax.random.fold_in(key, i), 4)
        first = jax.random.randint(k_t, (), 0, span)
        return (
            config.min_timestep + (first + apart) % span,
            jax.random.normal(k_noise, (K, *shape)),
            k_latent,
            jax.random.uniform(k_drop, ()) >= config.condition_dropout,
        )

    timesteps, noise, latent_keys, keep = jax.vmap(one)(index)
    return Draws(timesteps.reshape(-1), noise.reshape(-1, *shape), latent_keys, keep)


def denoising_losses(
    networks: Networks,
    params: Mapping[str, Any],
    latents: Float[Array, "B h w c"],
    context: Float[Array, "B S E"],
    draws: Draws,
    config: DenoisingConfig,
) -> Float[Array, " M"]:
    """Each draw's denoising loss, [M]: mean over the latent's elements."""
    if config.condition_dropout > 0:
        empty = empty_context(networks, params, context.shape[1]).astype(context.dtype)
        context = jnp.where(draws.keep_condition[:, None, None], context, empty)
    K = draws.timesteps.shape[0] // latents.shape[0]
    latents, context = (jnp.repeat(x, K, axis=0) if K > 1 else x for x in (latents, context))
    noisy = add_noise(networks.schedule, latents, draws.noise, draws.timesteps)
    target = training_target(networks.schedule, latents, draws.noise, draws.timesteps)
    error = predict_noise(networks, params, noisy, draws.timesteps, context) - target
    error = jnp.square(error) if config.loss == "mse" else jnp.abs(error)
    losses = jnp.mean(error, axis=(1, 2, 3))
    if config.min_snr_gamma is not None:
        losses = losses * min_snr_weight(networks.schedule, draws.timesteps, config.min_snr_gamma)
    return losses


def batch_features(networks: Networks, params: Mapping[str, Any], batch: Mapping[str, Array]):
    """Projected image tokens of a batch: the cached ones, or the tower's."""
    if "features" in batch:
        return batch["features"]
    return image_features(networks, params, batch["florence_image"])


def batch_latents(networks: Networks, params, batch: Mapping[str, Array], key, config):
    """Latents x0 and the step's draws; the posterior comes from the cache or the VAE."""
    if "latent_mean" in batch:
        mean, logvar = batch["latent_mean"], batch["latent_logvar"]
    else:
        mean, logvar = latent_moments(networks, params, batch["image"])
    draws = draw(networks, config, key, batch["index"], mean.shape[1:])
    return draw_latents(networks, mean, logvar, draws.latent_keys), draws


def make_loss(networks: Networks, config: DenoisingConfig) -> Callable:
    """The stage-1 loss `(trainable, frozen, batch, key) -> (loss, metrics)`.

    The batch has `index` int32 [B] and either `image` uint8 [B, H, W, 3] with `florence_image`
    uint8 [B, H', W', 3], or the cached `features` [B, P, D], `latent_mean` and `latent_logvar`.
    """
    from core_jax.partition import merge

    def loss(trainable, frozen, batch, key):
        params = merge(trainable, frozen)
        z = caption_embeddings(networks, params, batch_features(networks, params, batch))
        latents, draws = batch_latents(networks, params, batch, key, config)
        losses = denoising_losses(
            networks, params, latents, context_of(networks, params, z), draws, config
        )
        return jnp.mean(losses), {"z_rms": jnp.sqrt(jnp.mean(jnp.square(z.astype(jnp.float32))))}

    return loss
