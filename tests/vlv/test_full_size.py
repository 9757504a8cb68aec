"""The full-size networks, as shapes: no memory, no weights.

Numbers are those of the specification of the released code: trained parameters of both stages,
577 image tokens, 77 caption embeddings, 48x48 latents.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

from core_jax.diffusion.schedule import NoiseSchedule
from core_jax.models import autoencoder_kl, clip_text, florence2, qwen2, unet
from core_jax.partition import count_parameters, split
from vlv_jax import stage1, stage2
from vlv_jax.bridge import Bridge, CaptionProjector
from vlv_jax.encoding import caption_embeddings, context_of, image_features
from vlv_jax.networks import Networks
from vlv_jax.stage1 import DenoisingConfig
from vlv_jax.stage2 import CaptioningConfig, prefix_embeddings


@functools.cache
def _networks() -> Networks:
    return Networks(
        florence2=florence2.Florence2(config=florence2.Florence2Config.large()),
        bridge=Bridge(77, 1024, 1024),
        text_encoder=clip_text.CLIPTextModel(config=clip_text.CLIPTextConfig.sd21()),
        schedule=NoiseSchedule.stable_diffusion(),
        prompt_ids=tuple(range(14)),
        empty_ids=(0,) * 77,
        unet=unet.UNet2DConditionModel(config=unet.UNet2DConditionConfig.sd21_base()),
        vae=autoencoder_kl.AutoencoderKL(config=autoencoder_kl.AutoencoderKLConfig.sd21()),
        projector=CaptionProjector(2048),
        language_model=qwen2.Qwen2ForCausalLM(config=qwen2.Qwen2Config.qwen2p5_3b()),
    )


@functools.cache
def _params():
    n = _networks()
    key = jax.random.key(0)
    context = jax.ShapeDtypeStruct((1, 1, 1024), jnp.float32)
    return {
        "florence2": florence2.FAMILY.abstract_params(n.florence2),
        "text_encoder": clip_text.FAMILY.abstract_params(n.text_encoder),
        "unet": unet.FAMILY.abstract_params(n.unet),
        "vae": autoencoder_kl.FAMILY.abstract_params(n.vae),
        "language_model": qwen2.FAMILY.abstract_params(n.language_model),
        "bridge": jax.eval_shape(n.bridge.init, key)["params"],
        "projector": jax.eval_shape(n.projector.init, key, context)["params"],
    }


def _batch(**extra):
    return {
        "index": jax.ShapeDtypeStruct((2,), jnp.int32),
        "image": jax.ShapeDtypeStruct((2, 384, 384, 3), jnp.uint8),
        "florence_image": jax.ShapeDtypeStruct((2, 768, 768, 3), jnp.uint8),
        **extra,
    }


@pytest.mark.parametrize(
    ("patterns", "millions"),
    [(stage1.TRAINABLE, 357.0), (stage2.TRAINABLE, 3447.0), (stage2.TRAINABLE_MLP, 6.3)],
    ids=["stage1", "stage2", "projector"],
)
def test_trained_parameters_are_the_released_code_s(patterns, millions):
    trained, _ = split(_params(), patterns)
    assert abs(count_parameters(trained) / 1e6 - millions) < 1e-3 * millions


def test_shapes_from_pixels_to_the_language_model():
    networks, pixels = _networks(), _batch()["florence_image"]
    features = jax.eval_shape(functools.partial(image_features, networks), _params(), pixels)
    assert features.shape == (2, 577, 1024)
    z = jax.eval_shape(functools.partial(caption_embeddings, networks), _params(), features)
    context = jax.eval_shape(functools.partial(context_of, networks), _params(), z)
    prefix = jax.eval_shape(functools.partial(prefix_embeddings, networks), _params(), context)
    assert (z.shape, context.shape) == ((2, 77, 1024), (2, 77, 1024))
    assert prefix.shape == (2, 77, 2048)


def test_both_losses_trace_with_gradients():
    key = jax.eval_shape(lambda: jax.random.key(0))
    trained, frozen = split(_params(), stage1.TRAINABLE)
    loss = stage1.make_loss(_networks(), DenoisingConfig())
    value, grads = jax.eval_shape(
        jax.value_and_grad(lambda *a: loss(*a)[0]), trained, frozen, _batch(), key
    )
    assert value.shape == ()
    assert count_parameters(grads) == count_parameters(trained)
    trained, frozen = split(_params(), stage2.TRAINABLE)
    loss = stage2.make_loss(_networks(), CaptioningConfig(), DenoisingConfig())
    tokens = {
        "tokens": jax.ShapeDtypeStruct((2, 300), jnp.int32),
        "supervised": jax.ShapeDtypeStruct((2, 300), jnp.bool_),
    }
    value = jax.eval_shape(lambda *a: loss(*a)[0], trained, frozen, _batch(**tokens), key)
    assert value.shape == ()
