"""The reverse process: DDPM, DDIM and Euler as one table of coefficients.

A step of any of the three is, with m the denoiser's output,

    x0 = clip(x0_from_x * x + x0_from_m * m)
    x  = next_from_x0 * x0 + next_from_x * x + next_from_m * m + next_from_noise * noise

and all that differs is the numbers, which depend on the step only. They are computed once, in
NumPy float32 and in the order of diffusers 0.42, and indexed inside `lax.scan`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from core_jax.config import ConfigError
from core_jax.diffusion.schedule import NoiseSchedule, alphas_cumprod

KINDS = ("ddpm", "ddim", "euler")
_DEFAULT_SPACING = {"ddpm": "leading", "ddim": "leading", "euler": "linspace"}
_ONE = np.float32(1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """A discretised reverse process of N steps; a pytree, safe to close over or to pass to jit.

    Attributes:
        timesteps: What the denoiser is told at each step, [N], falling; int32, for Euler float32.
        input_scale: Factor on x before it enters the denoiser, float32 [N]; 1 except for Euler.
        x0_from_x: Coefficients as in the module's docstring, each float32 [N].
        x0_from_m: See there.
        next_from_x0: See there.
        next_from_x: See there.
        next_from_m: See there.
        next_from_noise: See there.
        init_noise_sigma: Standard deviation of the x that sampling starts from.
        clip_range: Bound of the predicted x0, or None.
        is_stochastic: Whether `step` needs noise.
        kind: "ddpm", "ddim" or "euler".
    """

    timesteps: Any
    input_scale: Any
    x0_from_x: Any
    x0_from_m: Any
    next_from_x0: Any
    next_from_x: Any
    next_from_m: Any
    next_from_noise: Any
    init_noise_sigma: Any
    clip_range: float | None = dataclasses.field(metadata={"static": True})
    is_stochastic: bool = dataclasses.field(metadata={"static": True})
    kind: str = dataclasses.field(metadata={"static": True})

    @property
    def num_steps(self) -> int:
        """Number of denoiser calls N."""
        return self.timesteps.shape[0]

    def scale_input(self, i, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns what the denoiser should see for the state x at step i."""
        return (jnp.asarray(self.input_scale)[i] * x).astype(x.dtype)

    def predict_x0(
        self, i, model_output: Float[Array, "..."], x: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """Returns the clean sample that the denoiser's output implies at step i, float32."""
        x0 = jnp.asarray(self.x0_from_x)[i] * x.astype(jnp.float32)
        x0 = x0 + jnp.asarray(self.x0_from_m)[i] * model_output.astype(jnp.float32)
        return x0 if self.clip_range is None else jnp.clip(x0, -self.clip_range, self.clip_range)

    def step(
        self,
        i,
        model_output: Float[Array, "..."],
        x: Float[Array, "..."],
        noise: Float[Array, "..."] | None = None,
    ) -> Float[Array, "..."]:
        """Returns the state after step i.

        Args:
            i: Step number in [0, N), an int or a traced integer.
            model_output: The denoiser's output for `scale_input(i, x)` at `timesteps[i]`.
            x: The state before the step.
            noise: Unit Gaussian noise of x's shape; needed when `is_stochastic`.

        Returns:
            The next state in x's dtype; computed in float32.

        Raises:
            ValueError: Noise is missing, or is given to a deterministic sampler.
        """
        if (noise is not None) != self.is_stochastic:
            raise ValueError(
                f"this {self.kind} sampler "
                + ("needs noise at every step" if self.is_stochastic else "takes no noise")
            )
        state, output = x.astype(jnp.float32), model_output.astype(jnp.float32)
        following = jnp.asarray(self.next_from_x0)[i] * self.predict_x0(i, output, state)
        following = following + jnp.asarray(self.next_from_x)[i] * state
        following = following + jnp.asarray(self.next_from_m)[i] * output
        if noise is not None:
            following = following + jnp.asarray(self.next_from_noise)[i] * noise
        return following.astype(x.dtype)


def inference_timesteps(schedule: NoiseSchedule, kind: str, num_steps: int) -> np.ndarray:
    """Returns the N falling timesteps at which the denoiser is called.

    Spacings as in table 2 of Lin et al., 2023 (arXiv 2305.08891), int32, for Euler float32
    (its linspace is not rounded).

    Raises:
        ConfigError: `num_steps` is not in [1, T], or a timestep would be past T - 1.
    """
    total = schedule.num_train_timesteps
    if not 1 <= num_steps <= total:
        raise ConfigError(f"num_steps is {num_steps}; it must be between 1 and {total}")
    spacing = schedule.timestep_spacing or _DEFAULT_SPACING[kind]
    dtype = np.float32 if kind == "euler" else np.int32
    if spacing == "linspace":
        times = np.linspace(0, total - 1, num_steps, dtype=np.float32 if kind == "euler" else None)
        times = times[::-1] if kind == "euler" else times.round()[::-1]
    elif spacing == "leading":
        times = (np.arange(num_steps) * (total // num_steps))[::-1] + schedule.steps_offset
    else:
        # Rounding of arange's length can yield one value too many, below 0; it is cut off.
        times = np.round(np.arange(total, 0, -(total / num_steps)))[:num_steps] - 1
    if times[0] > total - 1:
        raise ConfigError(
            f"{num_steps} steps with steps_offset={schedule.steps_offset} start at timestep "
            f"{int(times[0])}, past the last one ({total - 1}); use fewer steps or steps_offset=0"
        )
    return times.astype(dtype)


def make_sampler(
    schedule: NoiseSchedule, kind: str, num_steps: int, *, eta: float = 0.0
) -> Sampler:
    """Builds the tables of a sampler.

    Args:
        schedule: The noise schedule that the denoiser was trained with.
        kind: "ddpm" (Ho et al., 2020), "ddim" (Song et al., 2021) or "euler" (the discrete Euler
            sampler of Karras et al., 2022, without churn).
        num_steps: Number of denoiser calls.
        eta: DDIM's share of fresh noise, 0 (deterministic) to 1.

    Returns:
        The sampler.

    Raises:
        ValueError: Unknown kind, impossible number of steps, eta out of place, or a schedule whose
            first step has no signal (zero terminal SNR) with epsilon prediction.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown sampler {kind!r}; known are {', '.join(KINDS)}")
    if eta != 0.0 and (kind != "ddim" or not 0.0 < eta <= 1.0):
        raise ValueError(f"eta={eta} with {kind!r}; eta is DDIM's, between 0 and 1")
    times = inference_timesteps(schedule, kind, num_steps)
    if kind == "euler":
        return _euler(schedule, times)
    alpha = alphas_cumprod(schedule)[times]
    if schedule.prediction_type == "epsilon" and alpha[0] == 0:
        raise ValueError(
            f"timestep {times[0]} has zero signal (rescale_betas_zero_snr), where noise "
            "prediction says nothing about the image; use v_prediction, or a spacing other than "
            "trailing and linspace"
        )
    if kind == "ddpm":
        return _ddpm(schedule, times, alpha)
    return _ddim(schedule, times, alpha, np.float32(eta))


def _x0_coefficients(prediction_type: str, alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x0 as a combination of x and the output, for states sqrt(a) x0 + sqrt(1 - a) noise."""
    signal, sigma = np.sqrt(alpha), np.sqrt(_ONE - alpha)
    if prediction_type == "epsilon":
        return _ONE / signal, -sigma / signal
    if prediction_type == "v_prediction":
        return signal, -sigma
    return np.zeros_like(alpha), np.ones_like(alpha)


def _variance_preserving(kind: str, schedule: NoiseSchedule, times, alpha, coefficients) -> Sampler:
    x0_from_x, x0_from_m = _x0_coefficients(schedule.prediction_type, alpha)
    return Sampler(
        timesteps=times,
        input_scale=np.ones_like(alpha),
        x0_from_x=x0_from_x,
        x0_from_m=x0_from_m,
        init_noise_sigma=_ONE,
        clip_range=schedule.clip_sample_range if schedule.clip_sample else None,
        is_stochastic=bool(np.any(coefficients["next_from_noise"])),
        kind=kind,
        **coefficients,
    )


def _ddpm(schedule: NoiseSchedule, times: np.ndarray, alpha: np.ndarray) -> Sampler:
    """Equations 6 and 7 of Ho et al., 2020, with the next timestep in place of t - 1."""
    alpha_next = np.append(alpha[1:], _ONE)
    step_alpha = alpha / alpha_next
    step_beta = _ONE - step_alpha
    noise_share, noise_share_next = _ONE - alpha, _ONE - alpha_next
    if schedule.variance_type == "fixed_large":
        variance = step_beta
    else:
        # fixed_small_log is the same number by way of a logarithm. The floor makes the last step's
        # noise 1e-10 where it should be 0, as in diffusers.
        variance = np.maximum(noise_share_next / noise_share * step_beta, np.float32(1e-20))
    coefficients = {
        "next_from_x0": np.sqrt(alpha_next) * step_beta / noise_share,
        "next_from_x": np.sqrt(step_alpha) * noise_share_next / noise_share,
        "next_from_m": np.zeros_like(alpha),
        "next_from_noise": np.where(times > 0, np.sqrt(variance), np.float32(0)),
    }
    return _variance_preserving("ddpm", schedule, times, alpha, coefficients)


def _ddim(
    schedule: NoiseSchedule, times: np.ndarray, alpha: np.ndarray, eta: np.float32
) -> Sampler:
    """Equations 12 and 16 of Song et al., 2021."""
    table = alphas_cumprod(schedule)
    # diffusers subtracts T // N whatever the spacing, so this is not always the next timestep.
    following = times - schedule.num_train_timesteps // len(times)
    last = _ONE if schedule.set_alpha_to_one else table[0]
    alpha_next = np.where(following >= 0, table[np.maximum(following, 0)], last)
    noise_share, noise_share_next = _ONE - alpha, _ONE - alpha_next
    spread = eta * np.sqrt(noise_share_next / noise_share * (_ONE - alpha / alpha_next))
    direction = np.sqrt(np.maximum(noise_share_next - spread**2, np.float32(0)))
    # The direction points along the noise that the unclipped output implies: with
    # x = signal x0 + sigma noise, noise is this combination of x and the output.
    signal, sigma = np.sqrt(alpha), np.sqrt(noise_share)
    noise_from_x, noise_from_m = {
        "epsilon": (np.zeros_like(alpha), np.ones_like(alpha)),
        "v_prediction": (sigma, signal),
        "sample": (_ONE / sigma, -signal / sigma),
    }[schedule.prediction_type]
    coefficients = {
        "next_from_x0": np.sqrt(alpha_next),
        "next_from_x": direction * noise_from_x,
        "next_from_m": direction * noise_from_m,
        "next_from_noise": spread,
    }
    return _variance_preserving("ddim", schedule, times, alpha, coefficients)


def _euler(schedule: NoiseSchedule, times: np.ndarray) -> Sampler:
    """Euler steps of dx/dsigma = (x - x0) / sigma, for states x0 + sigma noise."""
    alpha = alphas_cumprod(schedule).copy()
    if schedule.rescale_betas_zero_snr:
        alpha[-1] = 2.0**-24  # an infinite sigma would be correct and useless
    table = np.sqrt((_ONE - alpha) / alpha)
    sigmas = np.interp(times, np.arange(len(table)), table).astype(np.float32)
    # The difference is rounded to float32 as in diffusers: where sigma is in the thousands, this
    # (and not the arithmetic on the state) decides the fourth digit of the result.
    change = (np.append(sigmas[1:], np.float32(0)) - sigmas) / sigmas.astype(np.float64)
    scale = _ONE / np.sqrt(sigmas**2 + _ONE)
    x0_from_x, x0_from_m = {
        "epsilon": (np.ones_like(sigmas), -sigmas),
        "v_prediction": (scale**2, -sigmas * scale),
        "sample": (np.zeros_like(sigmas), np.ones_like(sigmas)),
    }[schedule.prediction_type]
    leading = (schedule.timestep_spacing or _DEFAULT_SPACING["euler"]) == "leading"
    largest = sigmas.max()
    return Sampler(
        timesteps=times,
        input_scale=scale,
        x0_from_x=x0_from_x,
        x0_from_m=x0_from_m,
        next_from_x0=(-change).astype(np.float32),
        next_from_x=(1 + change).astype(np.float32),
        next_from_m=np.zeros_like(sigmas),
        next_from_noise=np.zeros_like(sigmas),
        init_noise_sigma=np.sqrt(largest**2 + _ONE) if leading else largest,
        clip_range=None,  # this sampler never clips
        is_stochastic=False,
        kind="euler",
    )
