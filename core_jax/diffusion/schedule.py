"""The forward process: how much noise a timestep means, and what the denoiser learns.

A `NoiseSchedule` is the content of a diffusers `scheduler_config.json`. Everything else is a pure
function of it. Tables are float32 and repeat diffusers' operations in diffusers' order: near
t = 0 the difference 1 - alphas_cumprod loses three digits in float32, so a table that is merely
more accurate gives measurably other samples.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large")
TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")

# Classes whose file describes such a discrete schedule, and whether the class clips the predicted
# x0 when its file does not say (the second group knows no clipping at all).
_CLIPS_BY_DEFAULT = {
    "DDPMScheduler": True,
    "DDIMScheduler": True,
    "PNDMScheduler": False,
    "EulerDiscreteScheduler": False,
    "EulerAncestralDiscreteScheduler": False,
    "LMSDiscreteScheduler": False,
    "HeunDiscreteScheduler": False,
    "DPMSolverMultistepScheduler": False,
    "DPMSolverSinglestepScheduler": False,
    "UniPCMultistepScheduler": False,
}
# Settings of samplers that are not ours; they do not change the schedule.
_IGNORED = frozenset(
    {
        *("_class_name", "_diffusers_version", "_use_default_values"),
        *("skip_prk_steps", "rho", "sigma_min", "sigma_max"),
        *("solver_order", "algorithm_type", "solver_type", "lower_order_final", "euler_at_final"),
        *("lambda_min_clipped", "use_lu_lambdas", "flow_shift", "use_dynamic_shifting"),
        *("predict_x0", "solver_p", "disable_corrector", "time_shift_type"),
        *("dynamic_thresholding_ratio", "sample_max_value"),
    }
)
# Settings that would change our samples and are not implemented, with the values that do not.
_INERT_VALUES = {
    "thresholding": (False,),
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_flow_sigmas": (False, None),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "final_sigmas_type": ("zero",),
    "shift_terminal": (None,),
    "variance_type": (None,),  # DPMSolver writes null; other values are ours
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """A discrete schedule of noise levels, with the names and defaults of diffusers.

    Attributes:
        num_train_timesteps: Number of noise levels T; timesteps are 0 .. T-1.
        beta_start: First variance increment.
        beta_end: Last variance increment.
        beta_schedule: "linear", "scaled_linear" (linear in the square root; Stable Diffusion) or
            "squaredcos_cap_v2" (the cosine of Nichol and Dhariwal, 2021).
        trained_betas: The T increments themselves, instead of the three fields above.
        prediction_type: What the denoiser outputs: "epsilon", "v_prediction" (Salimans and Ho,
            2022) or "sample" (x0).
        variance_type: DDPM's noise: "fixed_small", "fixed_small_log", "fixed_large".
        clip_sample: Clip the predicted x0 (DDPM and DDIM only). Right for pixels in [-1, 1],
            destructive for latents.
        clip_sample_range: Bound of that clip.
        set_alpha_to_one: DDIM's last step goes to alphas_cumprod 1 rather than to that of t = 0.
        steps_offset: Added to the timesteps of "leading" spacing.
        timestep_spacing: "leading", "linspace", "trailing", or None for the default of the
            diffusers class that samples (DDPM and DDIM leading, Euler linspace).
        rescale_betas_zero_snr: Rescale so that the last timestep is pure noise (Lin et al., 2023).

    Raises:
        ValueError: A value is not among those supported.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: str = "epsilon"
    variance_type: str = "fixed_small"
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True
    steps_offset: int = 0
    timestep_spacing: str | None = None
    rescale_betas_zero_snr: bool = False

    def __post_init__(self):
        for name, allowed in (
            ("beta_schedule", BETA_SCHEDULES),
            ("prediction_type", PREDICTION_TYPES),
            ("variance_type", VARIANCE_TYPES),
            ("timestep_spacing", (*TIMESTEP_SPACINGS, None)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"NoiseSchedule.{name} is {getattr(self, name)!r}; supported are "
                    + ", ".join(repr(value) for value in allowed)
                )
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise ValueError(
                f"NoiseSchedule.trained_betas has {len(self.trained_betas)} values for "
                f"num_train_timesteps={self.num_train_timesteps}; they must agree"
            )

    @classmethod
    def stable_diffusion(cls, **changes) -> "NoiseSchedule":
        """Schedule of Stable Diffusion 1.x and 2.1-base (2.1 at 768: v_prediction)."""
        sd = {
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
        }
        return cls(**{**sd, **changes})

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "NoiseSchedule":
        """Reads the content of a diffusers scheduler_config.json.

        The file of any sampler over a discrete schedule will do: Stable Diffusion ships PNDM's and
        trains with DDPM. A missing field takes the default of the class that samples, as when
        diffusers loads one class's file into another, with one exception: where the file's class
        knows no clipping (PNDM, Euler, ...) a missing `clip_sample` means False. diffusers'
        DDPMScheduler would take its own default there and clip latents to [-1, 1].

        Args:
            config: The parsed JSON.

        Returns:
            The schedule.

        Raises:
            ValueError: The class is unknown (flow matching, for one), or a field is unknown or has
                a value that would change the samples and is not implemented; all are named.
        """
        class_name = config.get("_class_name", "DDPMScheduler")
        if class_name not in _CLIPS_BY_DEFAULT:
            raise ValueError(
                f"scheduler_config.json is of class {class_name!r}, whose noise schedule is not "
                f"supported; known are {', '.join(_CLIPS_BY_DEFAULT)}"
            )
        names = {field.name for field in dataclasses.fields(cls)}
        values, problems = {}, []
        for name, value in config.items():
            if name in _INERT_VALUES and value in _INERT_VALUES[name]:
                continue
            if name in names:
                values[name] = value
            elif name not in _IGNORED:
                problems.append(f"{name}={value!r}")
        if problems:
            raise ValueError(
                f"scheduler_config.json ({class_name}) has settings that are not implemented: "
                + ", ".join(problems)
                + "; remove them if the samples should ignore them"
            )
        if values.get("trained_betas") is not None:
            values["trained_betas"] = tuple(float(beta) for beta in values["trained_betas"])
            values.setdefault("num_train_timesteps", len(values["trained_betas"]))
        values.setdefault("clip_sample", _CLIPS_BY_DEFAULT[class_name])
        return cls(**values)

    def to_hf(self, class_name: str = "DDPMScheduler") -> dict[str, Any]:
        """Returns the content of a scheduler_config.json; `from_hf` of it gives this schedule.

        Fields that `class_name` does not know are written as well, as in Stable Diffusion's own
        files; diffusers leaves them out.
        """
        config = {"_class_name": class_name, **dataclasses.asdict(self)}
        if self.trained_betas is not None:
            config["trained_betas"] = list(self.trained_betas)
        if self.timestep_spacing is None:
            del config["timestep_spacing"]
        return config


def _linspace(start: float, end: float, num: int) -> np.ndarray:
    """torch.linspace in float32: counted from both ends, rounding included."""
    first, last = np.float32(start), np.float32(end)
    if num == 1:
        return np.array([first])
    step = np.float64((last - first) / np.float32(num - 1))
    index = np.arange(num)
    # In float64 and rounded once, as a fused multiply-add does.
    rising = (first + step * index).astype(np.float32)
    falling = (last - step * (num - 1 - index)).astype(np.float32)
    return np.where(index < num // 2, rising, falling)


def _cosine_betas(num: int, max_beta: float = 0.999) -> np.ndarray:
    def alpha_bar(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - alpha_bar((i + 1) / num) / alpha_bar(i / num), max_beta) for i in range(num)]
    return np.array(betas, np.float32)


def _cumprod(values: np.ndarray) -> np.ndarray:
    # torch accumulates float32 products in float64 on the CPU.
    return np.cumprod(values, dtype=np.float64).astype(np.float32)


def _zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Algorithm 1 of Lin et al., 2023 (arXiv 2305.08891)."""
    root = np.sqrt(_cumprod(1 - betas))
    first, last = root[0].copy(), root[-1].copy()
    root = (root - last) * (first / (first - last))
    product = root**2
    return 1 - np.concatenate([product[:1], product[1:] / product[:-1]])


def betas(schedule: NoiseSchedule) -> np.ndarray:
    """Returns the variance increments, float32 [T]."""
    num = schedule.num_train_timesteps
    if schedule.trained_betas is not None:
        table = np.array(schedule.trained_betas, np.float32)
    elif schedule.beta_schedule == "linear":
        table = _linspace(schedule.beta_start, schedule.beta_end, num)
    elif schedule.beta_schedule == "scaled_linear":
        table = _linspace(schedule.beta_start**0.5, schedule.beta_end**0.5, num) ** 2
    else:
        table = _cosine_betas(num)
    return _zero_terminal_snr(table) if schedule.rescale_betas_zero_snr else table


@functools.lru_cache(maxsize=64)
def alphas_cumprod(schedule: NoiseSchedule) -> np.ndarray:
    """Returns the share of signal variance left at each timestep, float32 [T], read-only."""
    table = _cumprod(1 - betas(schedule))
    table.flags.writeable = False
    return table


def _at(table: np.ndarray, t: Array, ndim: int) -> Array:
    """table[t], shaped to multiply an array of `ndim` axes; NaN where t is out of range."""
    rows = jnp.asarray(table).at[t]
    values = rows.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    return values.reshape(values.shape + (1,) * (ndim - values.ndim)) if values.ndim else values


def add_noise(
    schedule: NoiseSchedule,
    x0: Float[Array, "B ..."],
    noise: Float[Array, "B ..."],
    t: Int[Array, "*B"],
) -> Float[Array, "B ..."]:
    """Returns x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise (Ho et al., 2020, equation 4).

    Args:
        schedule: The noise schedule.
        x0: Clean samples.
        noise: Unit Gaussian noise of the same shape.
        t: Timesteps in [0, T), one per sample or one for all. Out of range gives NaN.

    Returns:
        Noisy samples in x0's dtype; computed in float32.
    """
    alpha = alphas_cumprod(schedule)
    signal, sigma = _at(np.sqrt(alpha), t, x0.ndim), _at(np.sqrt(1 - alpha), t, x0.ndim)
    return (signal * x0 + sigma * noise).astype(x0.dtype)


def training_target(
    schedule: NoiseSchedule,
    x0: Float[Array, "B ..."],
    noise: Float[Array, "B ..."],
    t: Int[Array, "*B"],
) -> Float[Array, "B ..."]:
    """Returns what the denoiser should output: noise, velocity or x0, by `prediction_type`.

    Arguments as for `add_noise`; velocity is sqrt(a_t) noise - sqrt(1 - a_t) x0.
    """
    if schedule.prediction_type == "epsilon":
        return noise
    if schedule.prediction_type == "sample":
        return x0
    alpha = alphas_cumprod(schedule)
    signal, sigma = _at(np.sqrt(alpha), t, x0.ndim), _at(np.sqrt(1 - alpha), t, x0.ndim)
    return (signal * noise - sigma * x0).astype(x0.dtype)


def snr(schedule: NoiseSchedule, t: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """Returns the signal-to-noise ratio a_t / (1 - a_t), float32, NaN where t is out of range."""
    alpha = alphas_cumprod(schedule)
    return _at(alpha / (1 - alpha), t, jnp.ndim(t))


def min_snr_weight(
    schedule: NoiseSchedule, t: Int[Array, "*B"], gamma: float = 5.0
) -> Float[Array, "*B"]:
    """Returns min-SNR-gamma loss weights (Hang et al., 2023, arXiv 2303.09556).

    They weigh a squared error on `training_target`; all are min(SNR, gamma) on the x0 error.

    Args:
        schedule: The noise schedule; its prediction type decides the form.
        t: Timesteps in [0, T).
        gamma: Largest weight of an x0 error.

    Returns:
        Weights, float32.
    """
    ratio = snr(schedule, t)
    if schedule.prediction_type == "epsilon":
        return jnp.minimum(1.0, gamma / ratio)  # min(SNR, gamma) / SNR, finite at SNR = 0
    if schedule.prediction_type == "v_prediction":
        return jnp.minimum(ratio, gamma) / (ratio + 1)
    return jnp.minimum(ratio, gamma)


def random_timesteps(
    schedule: NoiseSchedule, key: jax.Array, shape: tuple[int, ...]
) -> Int[Array, "..."]:
    """Returns uniform timesteps in [0, T), int32."""
    return jax.random.randint(key, shape, 0, schedule.num_train_timesteps)
