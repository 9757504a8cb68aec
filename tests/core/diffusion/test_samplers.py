"""Samplers against diffusers, step by step over whole trajectories on the same noise."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_jax.diffusion import NoiseSchedule, guided, make_sampler, sample
from core_jax.diffusion.samplers import inference_timesteps

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STEPS, SHAPE = 12, (2, 3, 4, 2)
SPACINGS = ("leading", "linspace", "trailing")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
COMMON = {"beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
TOLERANCE = 1e-5


def _model(xp, x, t):
    """A smooth stand-in for a denoiser that depends on x and t."""
    return xp.tanh(x * (1.5 - t / 900.0)) + 0.3 * xp.sin(t / 100.0 + x)


class _Float64Torch:
    """torch, where float32 means float64."""

    def __getattr__(self, name):
        torch = pytest.importorskip("torch")

        return getattr(torch, "float64" if name == "float32" else name)


def _reference(kind, schedule_settings, start, noises, eta=0.0, steps=STEPS):
    """States of diffusers' own loop, and the scheduler.

    Its Euler step computes (x - x0) / sigma with x of sigma's size. Where sigma starts at
    thousands, that loses three of float32's seven digits (ours does not), so there the loop runs
    in float64 on diffusers' float32 tables.
    """
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    name = {"ddpm": "DDPM", "ddim": "DDIM", "euler": "EulerDiscrete"}[kind]
    cls = getattr(diffusers, name + "Scheduler")
    accepted = cls.__init__.__wrapped__.__code__.co_varnames
    scheduler = cls(**{k: v for k, v in schedule_settings.items() if k in accepted})
    scheduler.set_timesteps(steps)
    x, states = torch.tensor(start) * scheduler.init_noise_sigma, []
    with _fixed_noise(noises) as draws:
        if kind == "euler" and scheduler.init_noise_sigma > 1000:
            x = x.double()
            draws["patch"].setattr(
                diffusers.schedulers.scheduling_euler_discrete, "torch", _Float64Torch()
            )
        for i, t in enumerate(scheduler.timesteps):
            draws["next"] = i
            output = _model(torch, scheduler.scale_model_input(x, t), t.float())
            extra = {"eta": eta} if kind == "ddim" else {}
            x = scheduler.step(output, t, x, **extra).prev_sample
            states.append(x.numpy())
    return np.stack(states), scheduler


class _fixed_noise:
    """Makes diffusers draw step i's noise from a table."""

    def __init__(self, noises):
        self.noises, self.patch = noises, pytest.MonkeyPatch()

    def __enter__(self):
        torch = pytest.importorskip("torch")
        from diffusers.schedulers import scheduling_ddim, scheduling_ddpm

        state = {"next": 0, "patch": self.patch}
        for module in (scheduling_ddpm, scheduling_ddim):
            self.patch.setattr(
                module, "randn_tensor", lambda *_, **__: torch.tensor(self.noises[state["next"]])
            )
        return state

    def __exit__(self, *_):
        self.patch.undo()


def _ours(sampler, start, noises):
    x, states = jnp.asarray(start) * sampler.init_noise_sigma, []

    @jax.jit
    def advance(i, x, noise):
        t = jnp.asarray(sampler.timesteps)[i].astype(jnp.float32)
        output = _model(jnp, sampler.scale_input(i, x), t)
        return sampler.step(i, output, x, noise if sampler.is_stochastic else None)

    for i in range(sampler.num_steps):
        x = advance(jnp.asarray(i), x, noises[i])
        states.append(np.asarray(x))
    return np.stack(states)


def _draws(rng, steps=STEPS):
    return (
        rng.normal(size=SHAPE).astype(np.float32),
        rng.normal(size=(steps, *SHAPE)).astype(np.float32),
    )


def _error(ours, theirs):
    """Largest difference of any state over the largest value of that state."""
    axes = tuple(range(1, ours.ndim))
    return float((np.abs(ours - theirs).max(axes) / np.abs(theirs).max(axes)).max())


def _check(kind, settings, rng, eta=0.0, steps=STEPS):
    start, noises = _draws(rng, steps)
    theirs, scheduler = _reference(kind, settings, start, noises, eta, steps)
    schedule = NoiseSchedule(**settings)
    sampler = make_sampler(schedule, kind, steps, eta=eta)
    np.testing.assert_array_equal(sampler.timesteps, scheduler.timesteps.numpy())
    np.testing.assert_allclose(
        sampler.init_noise_sigma, float(scheduler.init_noise_sigma), rtol=1e-6
    )
    ours = _ours(sampler, start, noises)
    assert _error(ours, theirs) < TOLERANCE
    # Control: a slightly different schedule is not within a hundred tolerances.
    changed = {**settings, "beta_end": settings["beta_end"] * 1.01}
    if settings["beta_schedule"] == "squaredcos_cap_v2" or "rescale_betas_zero_snr" in settings:
        changed = {**settings, "num_train_timesteps": 970}  # these do not mind beta_end
    other = make_sampler(NoiseSchedule(**changed), kind, steps, eta=eta)
    assert _error(_ours(other, start, noises), theirs) > 100 * TOLERANCE


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [False, True])
def test_ddpm_equals_diffusers(spacing, prediction, clip, rng):
    settings = {"timestep_spacing": spacing, "prediction_type": prediction, "clip_sample": clip}
    _check("ddpm", {**COMMON, "beta_schedule": "scaled_linear", **settings}, rng)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
@pytest.mark.parametrize("beta", BETAS)
def test_ddpm_variances_and_betas_equal_diffusers(variance, beta, rng):
    settings = {"variance_type": variance, "beta_schedule": beta, "clip_sample_range": 1.5}
    _check("ddpm", {**COMMON, **settings}, rng)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("eta", "clip", "to_one"), [(0.0, False, False), (0.7, True, True)])
def test_ddim_equals_diffusers(spacing, prediction, eta, clip, to_one, rng):
    settings = {
        "timestep_spacing": spacing,
        "prediction_type": prediction,
        "clip_sample": clip,
        "set_alpha_to_one": to_one,
    }
    _check("ddim", {**COMMON, "beta_schedule": "scaled_linear", **settings}, rng, eta)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_betas_equal_diffusers(beta, eta, rng):
    _check("ddim", {**COMMON, "beta_schedule": beta}, rng, eta)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("beta", BETAS)
def test_euler_equals_diffusers(spacing, prediction, beta, rng):
    settings = {"timestep_spacing": spacing, "prediction_type": prediction, "beta_schedule": beta}
    _check("euler", {**COMMON, **settings}, rng)


@pytest.mark.parametrize("kind", ["ddpm", "ddim", "euler"])
def test_zero_terminal_snr_equals_diffusers(kind, rng):
    settings = {
        "beta_schedule": "scaled_linear",
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
    }
    _check(kind, {**COMMON, **settings}, rng)


def test_ddpm_adds_no_noise_at_timestep_zero(rng):
    settings = {"steps_offset": 0, "variance_type": "fixed_large", "clip_sample": False}
    _check("ddpm", {**COMMON, "beta_schedule": "scaled_linear", **settings}, rng)


@pytest.mark.parametrize("kind", ["ddpm", "ddim", "euler"])
def test_fifty_steps_of_stable_diffusion_equal_diffusers(kind, rng):
    settings = {"clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": "leading"}
    _check(kind, {**COMMON, "beta_schedule": "scaled_linear", **settings}, rng, steps=50)


@pytest.mark.parametrize("kind", ["ddpm", "ddim", "euler"])
def test_default_spacing_is_that_of_the_diffusers_class(kind, rng):
    _check(kind, {**COMMON, "beta_schedule": "scaled_linear", "clip_sample": False}, rng)


@pytest.mark.parametrize("kind", ["ddpm", "ddim", "euler"])
def test_timesteps_equal_diffusers_at_many_lengths(kind):
    diffusers = pytest.importorskip("diffusers")
    name = {"ddpm": "DDPM", "ddim": "DDIM", "euler": "EulerDiscrete"}[kind]
    for spacing, steps in itertools.product(SPACINGS, (1, 2, 3, 7, 20, 27, 30, 49, 999, 1000)):
        scheduler = getattr(diffusers, name + "Scheduler")(timestep_spacing=spacing)
        scheduler.set_timesteps(steps)
        ours = inference_timesteps(NoiseSchedule(timestep_spacing=spacing), kind, steps)
        np.testing.assert_array_equal(ours, scheduler.timesteps.numpy()[:steps])


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("kind", ["ddpm", "ddim", "euler"])
def test_timesteps_stay_in_range_at_every_length(kind, spacing):
    schedule = NoiseSchedule(timestep_spacing=spacing)
    for steps in range(1, 1001):
        times = inference_timesteps(schedule, kind, steps)
        assert len(times) == steps
        assert times.min() >= 0
        assert times.max() <= 999
        assert (np.diff(times) < 0).all()


def _stable(kind, **changes):
    return make_sampler(NoiseSchedule.stable_diffusion(**changes), kind, STEPS)


@pytest.mark.parametrize("kind", ["ddim", "euler"])
def test_scan_equals_the_loop(kind, rng):
    start, noises = _draws(rng)
    sampler = _stable(kind)
    want = _ours(sampler, start, noises)[-1]

    def denoise(x, t):
        assert t.shape == x.shape[:1]
        return _model(jnp, x, t.astype(jnp.float32).reshape(-1, 1, 1, 1) * jnp.ones_like(x))

    run = jax.jit(lambda sampler, noise: sample(denoise, sampler, noise))
    np.testing.assert_allclose(run(sampler, start), want, rtol=1e-5, atol=1e-5)


def test_perfect_denoiser_recovers_the_image(rng):
    x0 = jnp.asarray(rng.normal(size=SHAPE), jnp.float32)
    noise = jnp.asarray(rng.normal(size=SHAPE), jnp.float32)
    for kind in ("ddpm", "ddim", "euler"):
        sampler = _stable(kind, prediction_type="sample", set_alpha_to_one=True)
        result = sample(lambda x, t: x0, sampler, noise, jax.random.key(0))
        np.testing.assert_allclose(result, x0, atol=1e-5)


def test_noise_is_keyed_by_row_and_step():
    sampler, start = _stable("ddpm"), jnp.ones((3, 4))
    keys = jax.random.split(jax.random.key(1), 3)
    together = sample(lambda x, t: 0.1 * x, sampler, start, keys)
    alone = sample(lambda x, t: 0.1 * x, sampler, start[1:2], keys[1:2])
    np.testing.assert_allclose(together[1:2], alone, rtol=1e-6)
    assert np.abs(together[0] - together[1]).max() > 0.01
    one_key = sample(lambda x, t: 0.1 * x, sampler, start, jax.random.key(1))
    assert np.abs(one_key[0] - one_key[1]).max() > 0.01


def test_guidance_order_and_formula(rng):
    x, cond = rng.normal(size=(2, 3, 4)).astype(np.float32)
    uncond = rng.normal(size=(1, 4)).astype(np.float32)
    calls = []

    def denoise(x, t, context):
        calls.append((x.shape, t.shape))
        return x * context["a"] + t[:, None]

    t = jnp.array([1.0, 2.0, 3.0])
    got = guided(denoise, {"a": cond}, {"a": uncond}, 2.5)(jnp.asarray(x), t)
    want = x * uncond + 2.5 * (x * cond - x * uncond) + np.asarray(t)[:, None]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert calls == [((6, 4), (6,))]
    plain = guided(denoise, {"a": cond}, {"a": uncond}, 1.0)(jnp.asarray(x), t)
    np.testing.assert_allclose(plain, x * cond + np.asarray(t)[:, None], rtol=1e-6)
    assert calls[1] == ((3, 4), (3,))


def test_misuse_is_refused():
    schedule = NoiseSchedule.stable_diffusion()
    x = jnp.ones((1, 2))
    with pytest.raises(ValueError, match="unknown sampler 'pndm'"):
        make_sampler(schedule, "pndm", 10)
    with pytest.raises(ValueError, match="between 1 and 1000"):
        make_sampler(schedule, "ddim", 0)
    with pytest.raises(ValueError, match="steps_offset"):
        make_sampler(schedule, "ddim", 1000)
    with pytest.raises(ValueError, match="eta"):
        make_sampler(schedule, "ddpm", 10, eta=0.5)
    with pytest.raises(ValueError, match="pass a key"):
        sample(lambda x, t: x, make_sampler(schedule, "ddpm", 4), x)
    with pytest.raises(ValueError, match="needs noise"):
        make_sampler(schedule, "ddpm", 4).step(0, x, x)
    with pytest.raises(ValueError, match="takes no noise"):
        make_sampler(schedule, "ddim", 4).step(0, x, x, x)
    keys = jax.random.split(jax.random.key(0), 3)
    with pytest.raises(ValueError, match="one per row"):
        sample(lambda x, t: x, make_sampler(schedule, "ddpm", 4), x, keys)
    blind = NoiseSchedule(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(ValueError, match="zero signal"):
        make_sampler(blind, "ddim", 4)
