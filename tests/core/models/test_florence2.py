"""Florence-2 against transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_jax.models import load_model
from core_jax.ops.execution import Execution
from tests.core.models.florence2_twin import CONFIGS, make_twin
from tests.oracle import close, relative_error


@pytest.fixture(scope="module", params=CONFIGS)
def twin(request, tmp_path_factory):
    return make_twin(request.param, tmp_path_factory.mktemp("florence2"))


def _torch(array):
    import torch

    return torch.tensor(np.array(array))


def test_logits_and_every_part_equal_transformers(twin):
    import torch

    with torch.no_grad():
        out = twin.oracle(**twin.torch_inputs())
        grid = twin.oracle.model.vision_tower(_torch(twin.pixels).permute(0, 3, 1, 2))
    model, params = load_model(twin.path)
    apply = jax.jit(model.apply, static_argnames="method")
    features = apply({"params": params}, twin.pixels, method="vision_features")
    assert close(features, grid.last_hidden_state.permute(0, 2, 3, 1).numpy(), 1e-5)
    tokens = apply({"params": params}, features, method="project_features")
    assert close(tokens, twin.image_tokens().numpy(), 1e-5)
    prompt = apply({"params": params}, twin.prompt, method="embed_tokens")
    states = apply(
        {"params": params}, jnp.concatenate([tokens, prompt], 1), method="encode"
    )
    assert close(states, out.encoder_last_hidden_state.numpy(), 1e-5)
    logits = apply({"params": params}, twin.pixels, twin.prompt, twin.decoder_ids)
    assert close(logits, out.logits.numpy(), 1e-5)


@pytest.mark.parametrize(
    "path",
    [
        ("vision_tower", "blocks_2", "channel_block", "channel_attn", "qkv", "bias"),
        ("multi_modal_projector", "image_position_embed", "row_embeddings", "embedding"),
        ("language_model", "decoder", "layers", "encoder_attn", "q_proj", "kernel"),
    ],
)
def test_a_changed_weight_moves_the_logits(path):
    """The control: had the comparison been vacuous, this would pass the tolerance."""
    twin = make_twin("tall")
    model, params = load_model(twin.path)
    want = model.apply({"params": params}, twin.pixels, twin.prompt, twin.decoder_ids)
    leaf = params
    for key in path[:-1]:
        leaf = leaf[key]
    noise = np.random.default_rng(1).standard_normal(leaf[path[-1]].shape)
    leaf[path[-1]] = leaf[path[-1]] + jnp.asarray(0.3 * noise, jnp.float32)
    got = model.apply({"params": params}, twin.pixels, twin.prompt, twin.decoder_ids)
    assert relative_error(got, want) > 1e-3


def test_another_image_moves_the_logits():
    twin = make_twin("tall")
    model, params = load_model(twin.path)
    a = model.apply({"params": params}, twin.pixels, twin.prompt, twin.decoder_ids)
    b = model.apply({"params": params}, twin.pixels[::-1], twin.prompt, twin.decoder_ids)
    assert relative_error(b, a) > 1e-3


def test_im2col_and_remat_change_nothing():
    twin = make_twin("tall")
    model, params = load_model(twin.path)
    other = type(model)(model.config, Execution(conv="im2col", remat="full"))

    def loss(model, params):
        out = model.apply({"params": params}, twin.pixels, twin.prompt, twin.decoder_ids)
        return jnp.mean(jnp.square(out))

    a, grads_a = jax.jit(jax.value_and_grad(lambda p: loss(model, p)))(params)
    b, grads_b = jax.jit(jax.value_and_grad(lambda p: loss(other, p)))(params)
    assert abs(a - b) < 1e-5 * abs(a)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads_a))
    for one, two in zip(jax.tree.leaves(grads_a), jax.tree.leaves(grads_b), strict=True):
        assert float(jnp.abs(one - two).max()) < 1e-4 * scale


def test_bfloat16_runs_and_is_near():
    twin = make_twin("tall")
    model, params = load_model(twin.path)
    want = model.apply({"params": params}, twin.pixels, twin.prompt, twin.decoder_ids)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    got = model.apply({"params": half}, twin.pixels, twin.prompt, twin.decoder_ids)
    assert got.dtype == jnp.bfloat16
    assert 1e-5 < relative_error(got, want) < 0.1


def test_a_grid_larger_than_the_position_tables_is_an_error():
    twin = make_twin("tall")
    model, params = load_model(twin.path)
    side = 32 * (model.config.vision_config.max_position_embeddings + 1)
    with pytest.raises(ValueError, match="positions a side"):
        jax.eval_shape(
            lambda: model.apply({"params": params}, jnp.zeros((1, 64, side, 3)),
                                method="encode_image")
        )
