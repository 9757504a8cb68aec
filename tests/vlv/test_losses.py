"""Invariants of the two losses, on a tiny hub."""

import dataclasses
import functools
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from core_jax.models.auto import load_config
from core_jax.models.clip_text import FAMILY as CLIP_FAMILY
from core_jax.models.clip_text import CLIPTextModel
from core_jax.models.unet import FAMILY as UNET_FAMILY
from core_jax.models.unet import UNet2DConditionModel
from core_jax.partition import flatten, merge, split
from core_jax.train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from core_jax.train.state import init_state
from core_jax.train.step import make_train_step
from tests.vlv.hub import save_random
from vlv_jax import stage1, stage2
from vlv_jax.batches import caption_row, sample_index
from vlv_jax.encoding import (
    caption_embeddings,
    context_of,
    context_of_text,
    image_features,
    latent_moments,
)
from vlv_jax.experiment import ModelConfig
from vlv_jax.loading import load_networks, text_ids
from vlv_jax.stage1 import DenoisingConfig, Draws, denoising_losses, draw
from vlv_jax.stage2 import CaptioningConfig, caption_loss

DENOISING = DenoisingConfig()


@pytest.fixture(scope="module")
def vlv(tiny_hub):
    config = ModelConfig(**tiny_hub.model(stage=2))
    return load_networks(config)


def _batch(n=4, seed=0):
    rng = np.random.default_rng(seed)
    shape = (n, 32, 32, 3)
    return {
        "index": jnp.arange(n, dtype=jnp.int32) + 11,
        "image": jnp.asarray(rng.integers(0, 256, shape, np.uint8)),
        "florence_image": jnp.asarray(rng.integers(0, 256, shape, np.uint8)),
    }


def _features(vlv, batch):
    networks, params, _ = vlv
    return jax.jit(lambda params, image: image_features(networks, params, image))(
        params, batch["florence_image"]
    )


@functools.cache
def _program(networks, denoising=DENOISING, captioning=None, *, gradient=False):
    """The jitted loss of a stage, compiled once for all tests that call it.

    Without the gradient where that is not asked for: it is most of what there is to compile.
    """
    if captioning is None:
        loss = stage1.make_loss(networks, denoising)
    else:
        loss = stage2.make_loss(networks, captioning, denoising)
    return jax.jit(jax.value_and_grad(loss, has_aux=True) if gradient else loss)


def _stage1(vlv, batch, config=DENOISING):
    networks, params, _ = vlv
    program = _program(networks, config)
    value, _ = program(*split(params, stage1.TRAINABLE), batch, jax.random.key(3))
    return float(value)


def _stage1_gradient(vlv, batch):
    networks, params, _ = vlv
    program = _program(networks, gradient=True)
    (value, _), gradient = program(*split(params, stage1.TRAINABLE), batch, jax.random.key(3))
    return float(value), gradient


def test_query_i_sees_queries_up_to_i_only(vlv):
    networks, params, _ = vlv
    features = _features(vlv, _batch(1))

    def z_of(queries):
        changed = dict(params) | {"bridge": {**params["bridge"], "query_embed": queries}}
        return caption_embeddings(networks, changed, features)[0]

    queries = params["bridge"]["query_embed"]
    jacobian = jax.jit(jax.jacrev(lambda q: z_of(q)[5].sum()))(queries)
    assert np.all(np.asarray(jacobian[6:]) == 0)
    assert np.all(np.abs(np.asarray(jacobian[:6])).sum(-1) > 0)


def test_every_trained_leaf_of_stage1_gets_a_gradient(vlv):
    _, grads = _stage1_gradient(vlv, _cached(vlv, _batch()))
    dead = [n for n, g in flatten(grads).items() if not np.any(np.asarray(g))]
    # A bias of the keys shifts all logits of a softmax alike, so its gradient is zero but for
    # rounding; nothing else may be dead.
    assert all("k_proj/bias" in n for n in dead), dead


def test_stage1_draws_depend_on_the_example_only(vlv):
    """The order of a batch changes nothing but the order: noise is keyed by example."""
    networks, _, _ = vlv
    config = DENOISING
    key = jax.random.key(1)
    index = jnp.asarray([5, 9, 2], jnp.int32)
    a = stage1.draw(networks, config, key, index, (8, 8, 4))
    b = stage1.draw(networks, config, key, index[::-1], (8, 8, 4))
    np.testing.assert_array_equal(a.noise, b.noise[::-1])
    np.testing.assert_array_equal(a.timesteps, b.timesteps[::-1])
    c = stage1.draw(networks, config, jax.random.key(2), index, (8, 8, 4))
    assert not np.array_equal(a.noise, c.noise)


@pytest.mark.slow
def test_accumulated_stage1_step_equals_the_full_batch(vlv):
    networks, params, _ = vlv
    trained, frozen = split(params, stage1.TRAINABLE)
    config = OptimizerConfig(name="sgd", b1=0.0, learning_rate=1.0, clip_norm=None,
                             schedule="constant")  # fmt: skip
    optimizer, schedule = make_optimizer(config), make_schedule(config)
    loss = stage1.make_loss(networks, DENOISING)

    def after(accum, by_example):
        step = make_train_step(loss, optimizer, schedule, grad_accum=accum,
                               keyed_by_example=by_example)  # fmt: skip
        state, _ = jax.jit(step)(init_state(trained, optimizer), frozen, _batch())
        return ravel_pytree(state.params)[0] - ravel_pytree(trained)[0]

    whole = after(1, True)
    scale = jnp.abs(whole).max()
    assert jnp.abs(after(2, True) - whole).max() < 1e-4 * scale
    # The control: with keys of their own, micro-batches draw other noise.
    assert jnp.abs(after(2, False) - whole).max() > 1e-2 * scale


def _cached(vlv, batch):
    """The batch as it comes from a feature cache: a loss of it has no towers to compile."""
    networks, params, _ = vlv
    moments = jax.jit(lambda params, image: latent_moments(networks, params, image))
    mean, logvar = moments(params, batch["image"])
    return {
        "index": batch["index"],
        "features": _features(vlv, batch),
        "latent_mean": mean,
        "latent_logvar": logvar,
    }


@pytest.mark.slow
def test_cached_features_and_moments_give_the_same_stage1_loss(vlv):
    batch = _batch()
    plain, gradient = _stage1_gradient(vlv, batch)
    value, cached_gradient = _stage1_gradient(vlv, _cached(vlv, batch))
    assert abs(value - plain) < 1e-5 * abs(plain)
    gradient, cached_gradient = ravel_pytree(gradient)[0], ravel_pytree(cached_gradient)[0]
    assert jnp.abs(cached_gradient - gradient).max() < 1e-3 * jnp.abs(gradient).max()


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "l1"}, {"condition_dropout": 0.9}, {"min_snr_gamma": 1e-3}, {"min_timestep": 900},
        {"draws_per_image": 2},
    ],
)  # fmt: skip
def test_options_of_the_denoising_loss_change_it(vlv, options):
    batch = _cached(vlv, _batch())
    plain = _stage1(vlv, batch)
    changed = _stage1(vlv, batch, DenoisingConfig(**options))
    assert np.isfinite(changed)
    assert abs(changed - plain) > 1e-4 * plain


def test_a_dropped_condition_is_the_empty_caption_s_context(vlv):
    networks, params, pieces = vlv
    rng = np.random.default_rng(0)
    side, channels = networks.unet.config.sample_size, networks.unet.config.in_channels
    latents = jnp.asarray(rng.normal(size=(4, side, side, channels)), jnp.float32)
    width = networks.unet.config.cross_attention_dim
    context = jnp.asarray(rng.normal(size=(4, 6, width)), jnp.float32)
    draws = draw(networks, DENOISING, jax.random.key(1), jnp.arange(4), latents.shape[1:])
    text = text_ids(pieces.text_tokenizer, [""], 77)  # tokenised and encoded as a caption is
    encode = jax.jit(lambda ids: context_of_text(networks, params, ids))
    empty = encode(jnp.asarray(text))[:, :6]
    dropping = DenoisingConfig(condition_dropout=0.5)

    @jax.jit
    def losses(context, keep):
        kept = dataclasses.replace(draws, keep_condition=keep)
        return denoising_losses(networks, params, latents, context, kept, dropping)

    keep, all_kept = jnp.asarray([True, False, True, False]), jnp.ones(4, bool)
    got = losses(context, keep)
    contexts = jnp.where(keep[:, None, None], context, empty)
    np.testing.assert_allclose(got, losses(contexts, all_kept), rtol=1e-5)
    conditioned = losses(context, all_kept)  # the control: here nothing is dropped
    moved = np.abs(np.asarray(got - conditioned)) / np.asarray(conditioned)
    assert moved[1::2].min() > 1e-4
    assert moved[::2].max() < 1e-5


def test_the_condition_is_dropped_as_often_as_asked(vlv):
    config = DenoisingConfig(condition_dropout=0.3)
    kept = draw(vlv[0], config, jax.random.key(0), jnp.arange(2000), (1, 1, 1)).keep_condition
    assert abs(float(np.mean(kept)) - 0.7) < 0.04  # four standard deviations
    kept = draw(vlv[0], DENOISING, jax.random.key(0), jnp.arange(2000), (1, 1, 1)).keep_condition
    assert np.all(kept)


def test_stable_diffusion_1_5_conditions_on_the_queries(tiny_hub, tmp_path):
    """Another width, quick GELU, convolutions around the attention, one number of heads."""
    source, pipeline = pathlib.Path(tiny_hub.diffusion), tmp_path / "sd15"
    for part in ("vae", "scheduler", "tokenizer"):
        shutil.copytree(source / part, pipeline / part)
    text = load_config(source / "text_encoder")[1]
    text = dataclasses.replace(text, hidden_size=20, hidden_act="quick_gelu")
    save_random(CLIP_FAMILY, CLIPTextModel, text, pipeline / "text_encoder", 5)
    unet = load_config(source / "unet")[1]
    unet = dataclasses.replace(
        unet, cross_attention_dim=20, attention_head_dim=2, use_linear_projection=False
    )
    save_random(UNET_FAMILY, UNet2DConditionModel, unet, pipeline / "unet", 6)
    config = ModelConfig(**tiny_hub.model() | {"diffusion": str(pipeline)})
    networks, params, pieces = load_networks(config)
    rng = np.random.default_rng(0)
    latent = (2, unet.sample_size, unet.sample_size, unet.in_channels)
    batch = {
        "index": jnp.arange(2, dtype=jnp.int32),
        "features": jnp.asarray(rng.normal(size=(2, 5, 24)), jnp.float32),
        "latent_mean": jnp.asarray(rng.normal(size=latent), jnp.float32),
        "latent_logvar": jnp.full(latent, -4.0),
    }
    value = _stage1((networks, params, pieces), batch)
    # What a unit-variance prediction against unit noise loses, and a condition that is read.
    assert 0.3 < value < 10
    bridge = {**params["bridge"], "query_embed": -params["bridge"]["query_embed"]}
    other = _stage1((networks, {**params, "bridge": bridge}, pieces), batch)
    assert abs(other - value) > 1e-5 * value


def test_drawn_timesteps_stay_above_the_smallest(vlv):
    networks = vlv[0]
    T = networks.schedule.num_train_timesteps
    index, shape = jnp.arange(500), (1, 1, 1)
    late = DenoisingConfig(min_timestep=T - 10)
    drawn = draw(networks, late, jax.random.key(0), index, shape).timesteps
    assert set(np.asarray(drawn)) == set(range(T - 10, T))
    with pytest.raises(ValueError, match=f"min_timestep must be below the schedule's {T}"):
        draw(networks, DenoisingConfig(min_timestep=T), jax.random.key(0), index, shape)


def test_draws_of_an_image_lie_evenly_apart(vlv):
    networks = vlv[0]
    T = networks.schedule.num_train_timesteps
    index, shape = jnp.arange(50), (2, 2, 1)
    config = DenoisingConfig(min_timestep=T // 5, draws_per_image=4)
    drawn = draw(networks, config, jax.random.key(0), index, shape)
    span = T - T // 5
    times = np.sort(np.asarray(drawn.timesteps).reshape(50, 4), axis=1)
    assert times.min() >= T // 5
    assert times.max() < T
    assert np.abs(np.diff(times, axis=1) - span / 4).max() <= 1
    noise = np.asarray(drawn.noise).reshape(50, -1)
    assert len(np.unique(noise)) == noise.size


def test_loss_of_several_draws_is_the_mean_of_their_losses(vlv):
    """Image i's losses are those of the image alone with each of its timesteps and noises."""
    networks, params, _ = vlv
    config = DenoisingConfig(draws_per_image=2)
    rng = np.random.default_rng(0)
    side, channels = networks.unet.config.sample_size, networks.unet.config.in_channels
    latents = jnp.asarray(rng.normal(size=(3, side, side, channels)), jnp.float32)
    context = jnp.asarray(
        rng.normal(size=(3, 4, networks.unet.config.cross_attention_dim)), jnp.float32
    )
    draws = draw(networks, config, jax.random.key(1), jnp.arange(3), latents.shape[1:])
    losses = jax.jit(
        lambda latents, context, draws: denoising_losses(
            networks, params, latents, context, Draws(*draws), DenoisingConfig()
        )
    )
    parts = dataclasses.astuple(draws)
    together = losses(latents, context, parts)
    for i in range(3):
        pair = jnp.array([i, i])
        at = slice(2 * i, 2 * i + 2)
        alone = losses(
            latents[pair], context[pair], (parts[0][at], parts[1][at], parts[2][pair], None)
        )
        np.testing.assert_allclose(together[at], alone, rtol=1e-4)
    assert len(np.unique(np.asarray(together).round(6))) == 6


def _captions(vlv, texts, length=24, *, supervise_eos=True):
    rows = [
        caption_row(vlv[2].lm_tokenizer, t, length, supervise_eos=supervise_eos) for t in texts
    ]
    return {k: jnp.asarray(np.stack([r[k] for r in rows])) for k in rows[0]}


def _stage2(vlv, batch, **options):
    networks, params, _ = vlv
    program = _program(networks, captioning=CaptioningConfig(**options))
    value, metrics = program(*split(params, stage2.TRAINABLE), batch, jax.random.key(3))
    return float(value), metrics


def test_stage2_ignores_padding_and_supervises_the_end(vlv):
    texts = ["A red circle.", "A large blue star on the left."]
    batch = _batch(2) | _captions(vlv, texts)
    tokenizer = vlv[2].lm_tokenizer
    expected = sum(len(tokenizer(t)["input_ids"]) + 1 for t in texts)
    value, metrics = _stage2(vlv, batch)
    assert float(metrics["weight"]) == expected
    other = batch | {"tokens": jnp.where(batch["supervised"], batch["tokens"], 7)}
    assert abs(_stage2(vlv, other)[0] - value) < 1e-6 * value
    last = int(batch["supervised"][0].sum()) - 1
    assert int(batch["tokens"][0, last]) == tokenizer.eos_token_id
    changed = batch | {"tokens": batch["tokens"].at[0, last].set(7)}
    assert abs(_stage2(vlv, changed)[0] - value) > 1e-4 * value


def test_stage2_without_eos_supervises_the_words_only(vlv):
    with_end = _captions(vlv, ["A red circle."])
    without = _captions(vlv, ["A red circle."], supervise_eos=False)
    assert int(with_end["supervised"].sum()) == int(without["supervised"].sum()) + 1


def test_the_first_token_is_predicted_from_the_last_prefix_position(vlv):
    """Against a plain forward pass over [prefix; tokens] with shifted labels, as transformers'."""
    networks, params, _ = vlv
    batch = _batch(1) | _captions(vlv, ["A red circle."])
    features = _features(vlv, batch)

    @jax.jit
    def both(params):
        z = caption_embeddings(networks, params, features)
        prefix = stage2.prefix_embeddings(networks, params, context_of(networks, params, z))
        losses, correct = stage2.caption_losses(networks, params, prefix, batch["tokens"], 7)
        lm, weights = networks.language_model, {"params": params["language_model"]}
        tokens = lm.apply(weights, batch["tokens"], method="embed")
        hidden, _ = lm.apply(
            weights, jnp.concatenate([prefix, tokens], axis=1), method="from_embeddings"
        )
        logits = lm.apply(weights, hidden, method="logits")
        return losses, correct, logits[0, prefix.shape[1] - 1 : -1]

    losses, correct, logits = both(params)
    tokens = np.asarray(batch["tokens"][0])
    want = -np.asarray(jax.nn.log_softmax(logits, -1))[np.arange(len(tokens)), tokens]
    np.testing.assert_allclose(losses[0], want, atol=1e-5)
    np.testing.assert_array_equal(correct[0], np.argmax(logits, -1) == tokens)
    mask = np.asarray(batch["supervised"][0])
    value, _ = caption_loss(losses, correct, batch["supervised"])
    assert abs(float(value) - want[mask].mean()) < 1e-5


def test_joint_loss_adds_the_reconstruction(vlv):
    batch = _batch(2) | _captions(vlv, ["A red circle.", "A star."])
    plain = _stage2(vlv, batch)[0]
    value, metrics = _stage2(vlv, batch, reconstruction_weight=0.5)
    assert abs(value - (plain + 0.5 * float(metrics["denoising_loss"]))) < 1e-5 * value


def test_joint_loss_of_one_in_two_images_is_that_of_these_images(vlv):
    batch = _cached(vlv, _batch(4)) | _captions(vlv, ["A red circle.", "A star."] * 2)
    every_other = {name: rows[::2] for name, rows in batch.items()}
    some = _stage2(vlv, batch, reconstruction_weight=1.0, reconstruction_every=2)[1]
    alone = _stage2(vlv, every_other, reconstruction_weight=1.0)[1]
    np.testing.assert_allclose(some["denoising_loss"], alone["denoising_loss"], rtol=1e-5)
    assert abs(float(some["caption_loss"]) - float(alone["caption_loss"])) > 1e-4


@pytest.mark.slow
def test_fewer_queries_and_bfloat16_run(tiny_hub):
    config = dataclasses.replace(ModelConfig(**tiny_hub.model()), num_queries=3)
    networks, params, _ = load_networks(config)
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    trained, frozen = split(low, stage1.TRAINABLE)
    loss, _ = jax.jit(stage1.make_loss(networks, DENOISING))(
        trained, frozen, _batch(2), jax.random.key(0)
    )
    assert np.isfinite(float(loss))
    assert merge(trained, frozen)["bridge"]["query_embed"].shape[0] == 3
    with pytest.raises(ValueError, match="78"):
        load_networks(dataclasses.replace(config, num_queries=78))


def test_sample_index_is_stable():
    assert sample_index("000000000139") == 2001545895
    assert sample_index("a") != sample_index("b")
