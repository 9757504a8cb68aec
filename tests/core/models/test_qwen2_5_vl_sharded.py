"""Qwen2.5-VL on a (data, tensor) mesh of 8 devices gives what it gives on one."""

import jax
import jax.numpy as jnp
import numpy as np

from core_jax.decode import generate
from core_jax.decode.qwen2_5_vl import ImagePrompt, ImageTextDecoder
from core_jax.models.qwen2_5_vl import (
    FAMILY,
    ImageBatch,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLVisionConfig,
    pack_images,
    place_prompts,
)
from core_jax.sharding import DEFAULT_RULES, batch_sharding, make_mesh, param_shardings
from tests.oracle import close, relative_error

CONFIG = Qwen2_5_VLConfig(
    text_config=Qwen2_5_VLTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, mrope_section=(1, 2, 1),
    ),
    vision_config=Qwen2_5_VLVisionConfig(
        depth=2, hidden_size=32, intermediate_size=48, num_heads=4, patch_size=2, window_size=8,
        out_hidden_size=32, fullatt_block_indexes=(1,),
    ),
    image_token_id=60, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63,
)  # fmt: skip
GRIDS = [(1, 4, 6), (1, 6, 4), (1, 2, 6), (1, 8, 4)]


def _answers(params, batch, prefix):
    """(image tokens, prefix with them, generated ids)."""
    decoder = ImageTextDecoder(Qwen2_5_VLForConditionalGeneration(CONFIG))
    _, tokens = jax.jit(decoder.encode)(params, batch)
    prefix = prefix.replace(image_tokens=tokens)
    made = generate(decoder, params, prefix, max_new_tokens=16)
    return tokens, made.tokens


def test_sharded_towers_and_greedy_equal_unsharded():
    rng = np.random.default_rng(0)
    abstract = FAMILY.abstract_params(Qwen2_5_VLForConditionalGeneration(CONFIG))
    params = jax.tree.map(
        lambda x: jnp.float32(rng.normal(0, 0.1 if x.shape[0] == 64 else 0.7, x.shape)), abstract
    )
    images = [rng.normal(size=(np.prod(g), 24)).astype(np.float32) for g in GRIDS]
    packed = pack_images(images, GRIDS, CONFIG.vision_config)
    ids = rng.integers(0, 59, (4, 14)).astype(np.int32)
    for row, grid in zip(ids, GRIDS, strict=True):
        row[-3 - np.prod(grid) // 4 :] = [62, *[60] * (np.prod(grid) // 4), 63, 7]
    places = place_prompts(ids, None, packed, CONFIG)
    batch = ImageBatch(*(jnp.asarray(getattr(packed.batch, n)) for n in (
        "patches", "positions", "segments")))  # fmt: skip
    prefix = ImagePrompt.at(ids, places)
    tokens, answers = _answers(params, batch, prefix)
    assert len(np.unique(answers)) >= 10

    mesh = make_mesh({"data": 2, "tensor": 4})
    spread = jax.device_put(
        params, param_shardings(params, FAMILY.param_axes, DEFAULT_RULES, mesh)
    )
    kernel = spread["visual"]["blocks"]["mlp"]["up_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 32, 12)
    batch = jax.device_put(batch, batch_sharding(mesh))
    with jax.set_mesh(mesh):
        again, same = _answers(spread, batch, prefix)
    assert close(again, tokens, 1e-5)
    np.testing.assert_array_equal(same, answers)
    spread["visual"]["merger"]["ln_q"]["scale"] *= 1.1
    with jax.set_mesh(mesh):
        other, _ = _answers(spread, batch, prefix)
    assert relative_error(other, tokens) > 1e-3
