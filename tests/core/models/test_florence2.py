"""Florence-2 against transformers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_jax.models.florence2 import Florence2Config
from core_jax.ops.execution import Execution
from tests.core.models.florence2_twin import CONFIGS, make_twin, random_model
from tests.oracle import close, relative_error


@pytest.mark.parametrize("name", CONFIGS)
def test_the_image_path_equals_transformers(name):
    torch = pytest.importorskip("torch")

    twin = make_twin(name)
    with torch.no_grad():
        want = twin.oracle.get_image_features(twin.torch_pixels())
    model, params = twin.loaded

    @jax.jit
    def image_path(params, pixels):
        grid = model.apply({"params": params}, pixels, method="vision_features")
        return grid, model.apply({"params": params}, grid, method="project_features")

    grid, tokens = image_path(params, twin.pixels)
    assert grid.shape[1] != grid.shape[2]
    assert close(grid, want.last_hidden_state.permute(0, 2, 3, 1).numpy(), 1e-5)
    assert close(tokens, want.pooler_output.numpy(), 1e-5)
    # Controls: what a transposed image, or positions in another order, would give.
    assert relative_error(image_path(params, twin.pixels[:, ::-1])[0], grid) > 1e-3
    tables = params["multi_modal_projector"]["image_position_embed"]
    mixed = jax.tree.map(lambda x: x, params)
    mixed["multi_modal_projector"]["image_position_embed"] = {
        "row_embeddings": tables["column_embeddings"],
        "column_embeddings": tables["row_embeddings"],
    }
    assert relative_error(image_path(mixed, twin.pixels)[1], tokens) > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name):
    torch = pytest.importorskip("torch")

    twin = make_twin(name)
    with torch.no_grad():
        want = twin.oracle(**twin.torch_inputs()).logits.numpy()
    params = twin.loaded[1]
    assert close(twin.logits(params, twin.pixels), want, 1e-5)
    assert relative_error(twin.logits(params, twin.pixels[::-1]), want) > 1e-3


@pytest.mark.parametrize(
    "path",
    [
        "vision_tower/blocks_2/channel_block/channel_attn/qkv/kernel",
        "vision_tower/convs_3/norm/bias",
        "language_model/encoder/embed_positions/embedding",
        "language_model/decoder/layers/encoder_attn/q_proj/kernel",
    ],
)
def test_a_changed_weight_moves_the_logits(path):
    twin = make_twin("tall")
    params = jax.tree.map(lambda x: x, twin.loaded[1])
    *parents, last = path.split("/")
    leaf = params
    for key in parents:
        leaf = leaf[key]
    noise = np.random.default_rng(1).standard_normal(leaf[last].shape)
    leaf[last] = leaf[last] + jnp.asarray(noise, jnp.float32)
    want = twin.logits(twin.loaded[1], twin.pixels)
    assert relative_error(twin.logits(params, twin.pixels), want) > 1e-3


def test_bfloat16_runs_and_is_near():
    twin = make_twin("tall")
    want = twin.logits(twin.loaded[1], twin.pixels)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), twin.loaded[1])
    got = twin.logits(half, twin.pixels)
    assert got.dtype == jnp.bfloat16
    assert 1e-5 < relative_error(got, want) < 0.1


@pytest.mark.slow
def test_other_convolutions_and_remat_change_no_gradient():
    config = Florence2Config.tiny()
    vision = dataclasses.replace(
        config.vision_config, depths=(1, 2), patch_size=(3, 3), patch_stride=(4, 2),
        patch_padding=(1, 1), patch_prenorm=(False, True), embed_dim=(16, 32), num_heads=(1, 2),
        num_groups=(1, 2),
    )  # fmt: skip
    config = dataclasses.replace(config, vision_config=vision)
    pixels = np.random.default_rng(0).standard_normal((1, 24, 16, 3)).astype(np.float32)

    def gradient(execution):
        model, params = random_model(config, execution)

        def loss(params):
            tokens = model.apply({"params": params}, jnp.asarray(pixels), method="encode_image")
            states = model.apply({"params": params}, tokens, method="encode")
            return jnp.mean(states**3)

        return jax.jit(jax.grad(loss))(params)

    plain, other = gradient(Execution()), gradient(
        Execution(conv="im2col", depthwise_conv="shifts", remat="full", unroll=8)
    )
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(plain))
    assert scale > 0
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
        assert float(jnp.abs(a - b).max()) < 1e-4 * scale


def test_a_grid_larger_than_the_position_tables_is_an_error():
    model, params = random_model()
    with pytest.raises(ValueError, match="2 x 11 grid, but the model has 10 positions a side"):
        jax.eval_shape(
            lambda x: model.apply({"params": params}, x, method="encode_image"),
            jax.ShapeDtypeStruct((1, 64, 352, 3), jnp.float32),
        )
