"""Noise schedules and samplers: DDPM, DDIM and Euler, equal to diffusers' classes."""

from core_jax.diffusion.samplers import Sampler, make_sampler
from core_jax.diffusion.sampling import guided, sample
from core_jax.diffusion.schedule import (
    NoiseSchedule,
    add_noise,
    alphas_cumprod,
    min_snr_weight,
    snr,
    training_target,
)

__all__ = [
    "NoiseSchedule",
    "Sampler",
    "add_noise",
    "alphas_cumprod",
    "guided",
    "make_sampler",
    "min_snr_weight",
    "sample",
    "snr",
    "training_target",
]
