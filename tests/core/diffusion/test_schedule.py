"""Noise schedules against diffusers and against recorded values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_jax.diffusion import (
    NoiseSchedule,
    add_noise,
    alphas_cumprod,
    min_snr_weight,
    snr,
    training_target,
)
from core_jax.diffusion.samplers import inference_timesteps
from core_jax.diffusion.schedule import random_timesteps

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

# The file that stable-diffusion-2-1-base ships.
SD21 = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.8.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}


def test_stable_diffusion_golden_values():
    schedule = NoiseSchedule.from_hf(SD21)
    assert schedule == NoiseSchedule.stable_diffusion()
    table = alphas_cumprod(schedule)
    assert table[0] == pytest.approx(0.99914998, abs=1e-8)
    assert table[999] == pytest.approx(0.00466010, abs=1e-8)
    assert inference_timesteps(schedule, "ddpm", 50).tolist() == list(range(981, 0, -20))


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("steps", [1000, 17])
def test_tables_equal_diffusers(beta_schedule, zero_snr, steps, monkeypatch):
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    # torch's float32 square root is an ulp off for a fifth of all numbers on some machines, and
    # zero SNR takes it twice; with a correctly rounded one the tables are the same bits.
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda x: torch.sqrt(x.double()).float())
    settings = {
        "num_train_timesteps": steps,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": beta_schedule,
        "rescale_betas_zero_snr": zero_snr,
    }
    theirs = diffusers.DDPMScheduler(**settings).alphas_cumprod.numpy()
    ours = alphas_cumprod(NoiseSchedule(**settings))
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, theirs)
    other = alphas_cumprod(NoiseSchedule(**{**settings, "beta_start": 0.0009}))
    if beta_schedule != "squaredcos_cap_v2":  # which has no beta_start
        assert np.abs(other - theirs).max() > 1e-5


def test_trained_betas_equal_diffusers():
    diffusers = pytest.importorskip("diffusers")
    betas = np.random.default_rng(0).uniform(0.001, 0.02, 40).tolist()
    config = {"_class_name": "DDIMScheduler", "trained_betas": betas}
    schedule = NoiseSchedule.from_hf(config)
    theirs = diffusers.DDIMScheduler(num_train_timesteps=40, trained_betas=betas)
    np.testing.assert_array_equal(alphas_cumprod(schedule), theirs.alphas_cumprod.numpy())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_add_noise_and_target_equal_diffusers(prediction_type, rng):
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    schedule = NoiseSchedule.stable_diffusion(prediction_type=prediction_type)
    theirs = diffusers.DDPMScheduler.from_config(schedule.to_hf())
    x0, noise = rng.normal(size=(2, 5, 3, 4, 2)).astype(np.float32)
    t = np.array([0, 1, 400, 998, 999])
    want = theirs.add_noise(torch.tensor(x0), torch.tensor(noise), torch.tensor(t)).numpy()
    np.testing.assert_allclose(add_noise(schedule, x0, noise, t), want, rtol=1e-6, atol=1e-6)
    one = add_noise(schedule, x0, noise, jnp.asarray(400))
    np.testing.assert_allclose(one[2], want[2], rtol=1e-6, atol=1e-6)
    target = training_target(schedule, jnp.asarray(x0), jnp.asarray(noise), jnp.asarray(t))
    velocity = theirs.get_velocity(torch.tensor(x0), torch.tensor(noise), torch.tensor(t))
    want = {"epsilon": noise, "sample": x0, "v_prediction": velocity.numpy()}[prediction_type]
    np.testing.assert_allclose(target, want, rtol=1e-6, atol=1e-6)


def test_bad_timesteps_give_nan_not_another_noise_level():
    schedule, x = NoiseSchedule(), jnp.ones((3, 2))
    noisy = add_noise(schedule, x, x, jnp.array([-1, 5, 1000]))
    assert np.isnan(noisy).all(axis=1).tolist() == [True, False, True]


def test_bfloat16_in_bfloat16_out_but_computed_in_float32():
    schedule, t = NoiseSchedule.stable_diffusion(), jnp.array([3])
    x, noise = jnp.ones((1, 4), jnp.bfloat16), jnp.full((1, 4), 0.5, jnp.bfloat16)
    noisy = add_noise(schedule, x, noise, t)
    exact = add_noise(schedule, x.astype(jnp.float32), noise.astype(jnp.float32), t)
    assert noisy.dtype == jnp.bfloat16
    np.testing.assert_array_equal(noisy, exact.astype(jnp.bfloat16))


def test_snr_and_min_snr_weights():
    t = jnp.array([0, 500, 999])
    schedule = NoiseSchedule.stable_diffusion()
    alpha = alphas_cumprod(schedule)[np.asarray(t)].astype(np.float64)
    ratio = alpha / (1 - alpha)
    np.testing.assert_allclose(snr(schedule, t), ratio, rtol=1e-4)
    clipped = np.minimum(ratio, 5)
    np.testing.assert_allclose(min_snr_weight(schedule, t), clipped / ratio, rtol=1e-4)
    velocity = dataclasses.replace(schedule, prediction_type="v_prediction")
    np.testing.assert_allclose(min_snr_weight(velocity, t), clipped / (ratio + 1), rtol=1e-4)
    x0 = dataclasses.replace(schedule, prediction_type="sample")
    np.testing.assert_allclose(min_snr_weight(x0, t), clipped, rtol=1e-4)


def test_min_snr_weight_is_finite_without_signal():
    schedule = NoiseSchedule(rescale_betas_zero_snr=True)
    assert snr(schedule, jnp.asarray(999)) == 0
    assert min_snr_weight(schedule, jnp.asarray(999)) == 1


def test_random_timesteps_cover_the_range():
    t = random_timesteps(NoiseSchedule(num_train_timesteps=7), jax.random.key(0), (500,))
    assert sorted(set(t.tolist())) == list(range(7))


def test_hf_round_trip():
    schedule = NoiseSchedule(
        num_train_timesteps=3,
        trained_betas=(0.1, 0.2, 0.3),
        prediction_type="v_prediction",
        variance_type="fixed_large",
        clip_sample_range=2.0,
        timestep_spacing="trailing",
    )
    assert NoiseSchedule.from_hf(schedule.to_hf()) == schedule
    plain = NoiseSchedule.stable_diffusion()
    assert NoiseSchedule.from_hf(plain.to_hf("PNDMScheduler")) == plain
    assert "timestep_spacing" not in plain.to_hf()


@pytest.mark.parametrize(
    ("class_name", "clips"), [("DDPMScheduler", True), ("PNDMScheduler", False)]
)
def test_missing_clip_sample_is_the_default_of_the_files_class(class_name, clips):
    config = {k: v for k, v in SD21.items() if k != "clip_sample"}
    assert NoiseSchedule.from_hf({**config, "_class_name": class_name}).clip_sample is clips


@pytest.mark.parametrize(
    "name",
    [
        *("DDPM", "DDIM", "PNDM", "EulerDiscrete", "EulerAncestralDiscrete", "LMSDiscrete"),
        *("HeunDiscrete", "DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep"),
    ],
)
def test_files_that_diffusers_writes_are_read(name):
    diffusers = pytest.importorskip("diffusers")
    theirs = getattr(diffusers, name + "Scheduler")(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    schedule = NoiseSchedule.from_hf(dict(theirs.config))
    np.testing.assert_allclose(
        alphas_cumprod(schedule), theirs.alphas_cumprod.numpy(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatch"),
        ({"surprise": 1}, "surprise=1"),
        ({"thresholding": True}, "thresholding=True"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas"),
        ({"variance_type": "learned_range"}, "learned_range"),
        ({"beta_schedule": "sigmoid"}, "sigmoid"),
        ({"prediction_type": "flow"}, "flow"),
        ({"timestep_spacing": "random"}, "random"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
    ],
)
def test_settings_that_would_change_samples_are_refused(change, named):
    with pytest.raises(ValueError, match=named):
        NoiseSchedule.from_hf({**SD21, **change})
