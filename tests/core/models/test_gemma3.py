"""Gemma 3 with images against transformers: tower, logits, padding, two images, bad prompts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_jax.models.gemma3 import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    ImagePromptError,
    check_placeholders,
)
from core_jax.models.gemma3_text import Gemma3TextConfig
from core_jax.models.siglip import SiglipVisionConfig
from core_jax.ops.execution import Execution
from core_jax.partition import flatten
from tests.core.models.gemma3_twin import (
    PLACEHOLDER,
    TEXT,
    VOCAB,
    image_twin,
    oracle_inputs,
    oracle_logits,
    pixels,
    prompt,
    text_ids,
)
from tests.oracle import close, relative_error

NAMES = list(TEXT)


def _logits(twin, ids, images=None, valid=None):
    images = None if images is None else jnp.asarray(images)
    valid = None if valid is None else jnp.asarray(valid)
    return jax.jit(twin.model.apply)({"params": twin.params}, jnp.asarray(ids), images, valid)


@pytest.mark.parametrize("name", NAMES)
def test_tower_and_image_tokens_equal_transformers(name):
    torch = pytest.importorskip("torch")

    twin, images = image_twin(name), pixels(name, 2)
    with torch.no_grad():
        want = twin.oracle.get_image_features(torch.tensor(images.transpose(0, 3, 1, 2)))

    def apply(method, x):
        return jax.jit(lambda p, x: twin.model.apply({"params": p}, x, method=method))(
            twin.params, x
        )

    grid = apply("vision_features", jnp.asarray(images))
    side = twin.model.config.vision_config.patches_per_side
    assert grid.shape[1:3] == (side, side)
    patches = want.last_hidden_state.numpy()
    assert close(np.array(grid).reshape(patches.shape), patches, 1e-5)
    tokens = apply("project_features", grid)
    assert close(tokens, want.pooler_output.numpy(), 1e-5)
    # Rows and columns exchanged are seen.
    turned = apply("project_features", jnp.swapaxes(grid, 1, 2))
    assert relative_error(turned, want.pooler_output.numpy()) > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_logits_with_two_images_equal_transformers(name):
    twin, ids, images = image_twin(name), prompt(name, 2, 40), pixels(name, 2)
    want = oracle_logits(twin, **oracle_inputs(name, ids, images))
    got = _logits(twin, ids, images)
    assert close(got, want, 1e-5)
    # Controls: the images the other way round, one changed a little, and no view ahead.
    assert relative_error(_logits(twin, ids, images[::-1]), want) > 1e-2
    brighter = images + np.array([0, 0.05], np.float32)[:, None, None, None]
    assert relative_error(_logits(twin, ids, brighter), want) > 1e-3
    inputs = oracle_inputs(name, ids, images)
    inputs["token_type_ids"] = inputs["token_type_ids"] * 0
    assert relative_error(oracle_logits(twin, **inputs), want) > 1e-2


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_different_lengths_equal_rows_alone(side):
    name = "remainder"
    twin, images = image_twin(name), pixels(name, 2)
    rows = [prompt(name, 1, 34, seed=0), prompt(name, 1, 21, seed=1)]
    ids, valid = np.full((2, 34), 7, np.int32), np.zeros((2, 34), bool)
    for row, alone in enumerate(rows):
        place = slice(34 - alone.shape[1], 34) if side == "left" else slice(0, alone.shape[1])
        ids[row, place], valid[row, place] = alone[0], True
    got = np.array(_logits(twin, ids, images, valid))
    if side == "left":
        want = oracle_logits(twin, **oracle_inputs(name, ids, images, valid))
        assert close(got[valid], want[valid], 1e-5)
    for row, alone in enumerate(rows):
        want = oracle_logits(twin, **oracle_inputs(name, alone, images[row : row + 1]))
        assert close(got[row][valid[row]], want[0], 1e-5)
    assert relative_error(np.array(_logits(twin, ids, images))[1][valid[1]], want[0]) > (
        1e-3 if side == "left" else -1
    )


@pytest.mark.parametrize("name", NAMES)
def test_text_only_prompts_equal_transformers(name):
    twin, ids = image_twin(name), text_ids(2, 30)
    want = oracle_logits(twin, **oracle_inputs(name, ids))
    assert close(_logits(twin, ids), want, 1e-5)


def test_a_placeholder_outside_the_vocabulary_reads_as_token_0():
    twin = image_twin("remainder")
    assert PLACEHOLDER["remainder"] >= VOCAB
    ids = jnp.asarray([[5, PLACEHOLDER["remainder"], 0, VOCAB - 1]])
    got = twin.model.apply({"params": twin.params}, ids, method="embed")
    table = twin.params["language_model"]["embed_tokens"]["embedding"]
    np.testing.assert_array_equal(got[0], table[jnp.array([5, 0, 0, VOCAB - 1])] * 8.0)


def test_blocks_are_runs_of_placeholders():
    twin, p = image_twin("remainder"), PLACEHOLDER["remainder"]
    ids = jnp.asarray([[p, p, 3, p, 4, 5], [3, 4, p, p, p, p]])
    got = twin.model.apply({}, ids, method="image_blocks")
    assert got.tolist() == [[0, 0, -1, 1, -1, -1], [-1, -1, 0, 0, 0, 0]]


def test_prompts_whose_placeholders_do_not_fit_are_refused():
    config = image_twin("remainder").model.config
    ids = np.concatenate([prompt("remainder", n, 34) for n in (0, 1, 2)])
    check_placeholders(ids, [0, 1, 2], config)
    with pytest.raises(ImagePromptError, match=r"row 0 has 0 .*row 2 has 8 .*but 1 images of 4"):
        check_placeholders(ids, [1, 1, 1], config)
    p = PLACEHOLDER["remainder"]
    with pytest.raises(ImagePromptError, match=r"row 0 has runs of \[8\]"):
        check_placeholders(np.array([[3, *[p] * 8, 5]]), [2], config)
    with pytest.raises(ImagePromptError, match=r"row 0 has runs of \[3, 1\]"):
        check_placeholders(np.array([[p, p, p, 5, p]]), [1], config)


def test_images_of_another_size_are_refused():
    twin = image_twin("remainder")
    with pytest.raises(ValueError, match="70 x 70"):
        twin.model.apply({"params": twin.params}, jnp.zeros((1, 64, 70, 3)), method="encode_image")


def test_configurations_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="mm_tokens_per_image 5"):
        Gemma3Config(mm_tokens_per_image=5)
    with pytest.raises(ValueError, match="14 x 14"):
        Gemma3Config(vision_config=SiglipVisionConfig(), mm_tokens_per_image=9)
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        Gemma3Config(
            text_config=Gemma3TextConfig(final_logit_softcapping=30.0),
            vision_config=SiglipVisionConfig.so400m_896(),
        )
    with pytest.raises(ValueError, match="quick_gelu"):
        SiglipVisionConfig.from_hf({"hidden_act": "quick_gelu"})
    with pytest.raises(ValueError, match="not square"):
        SiglipVisionConfig.from_hf({"image_size": [32, 64]})


def test_bfloat16_is_near_float32_and_remat_changes_nothing():
    name = "remainder"
    twin, ids, images = image_twin(name), prompt(name, 1, 14), pixels(name, 1)
    want = _logits(twin, ids, images)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), twin.params)
    got = jax.jit(twin.model.apply)({"params": half}, jnp.asarray(ids), jnp.asarray(images))
    assert got.dtype == jnp.bfloat16
    assert 1e-4 < relative_error(got.astype(jnp.float32), want) < 0.2

    def loss(params, model):
        logits = model.apply({"params": params}, jnp.asarray(ids), jnp.asarray(images))
        return jnp.mean(jnp.square(logits))

    remat = Gemma3ForConditionalGeneration(twin.model.config, Execution(remat="full"))
    grad = jax.jit(jax.grad(loss), static_argnums=1)
    plain, again = (flatten(grad(twin.params, m)) for m in (twin.model, remat))
    for path, leaf in plain.items():
        assert np.abs(leaf).max() > 0, path
        assert close(again[path], leaf, 1e-4), path
