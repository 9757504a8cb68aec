"""Qwen2.5-VL against transformers: image tokens, logits, positions, packing."""

import dataclasses
import types

import jax.numpy as jnp
import numpy as np
import pytest

from core_jax.data.qwen2_5_vl_images import Qwen2_5_VLImageProcessor
from core_jax.models.qwen2 import Qwen2Config, Qwen2ForCausalLM
from core_jax.models.qwen2_5_vl import (
    ImagePromptError,
    Qwen2_5_VLVisionConfig,
    pack_images,
    place_prompts,
)
from tests.core.models.qwen2_5_vl_twin import (
    CONFIGS,
    IMAGE,
    apply,
    batch,
    oracle_logits,
    our_inputs,
    prompt,
    random_images,
    tiny,
    torch_inputs,
)
from tests.oracle import close, relative_error

GRIDS = [(1, 6, 10), (1, 14, 4), (1, 4, 8)]
TOLERANCE = 1e-5
ONE_ROW = {"rows": 1, "windows": 20}  # one shape for several tests


@pytest.fixture(scope="module", params=CONFIGS)
def twin(request):
    return tiny(request.param)


def _rows():
    # Row 0 has two images of different sizes, row 1 one and much text, row 2 none.
    return batch([
        prompt(5, GRIDS[0], 3, GRIDS[1], 60, seed=1),
        prompt(90, GRIDS[2], 40, seed=2),
        prompt(30, seed=3),
    ])


def _logits(model, params, inputs):
    return np.asarray(apply(model, params, *inputs))


def _oracle_tokens(oracle, patches, grids):
    torch = pytest.importorskip("torch")

    with torch.no_grad():
        found = oracle.get_image_features(
            torch.tensor(np.concatenate(patches)), torch.tensor(grids)
        )
    return torch.cat(list(found.pooler_output)).numpy()


def _tokens(model, params, packed):
    b = packed.batch
    args = map(jnp.asarray, (b.patches, b.positions, b.segments))
    tokens = apply(model, params, *args, method="image_tokens")
    return np.asarray(tokens).reshape(-1, tokens.shape[-1])[np.concatenate(packed.token_slots)]


def test_image_tokens_equal_transformers_however_they_are_packed(twin):
    oracle, model, params = twin
    tower = model.config.vision_config
    patches = random_images(model.config, GRIDS)
    want = _oracle_tokens(oracle, patches, GRIDS)
    for packing in (ONE_ROW, {}):
        packed = pack_images(patches, GRIDS, tower, **packing)
        assert close(_tokens(model, params, packed), want, TOLERANCE), packing
    # Controls: another order of the windows' patches, and images that see one another.
    turned = [(g[0], g[2], g[1]) for g in GRIDS]
    packed = pack_images(patches, turned, tower, **ONE_ROW)
    assert relative_error(_tokens(model, params, packed), want) > 1e-2
    packed = pack_images(patches, GRIDS, tower, **ONE_ROW)
    packed.batch.segments[:] = packed.batch.segments > 0
    assert relative_error(_tokens(model, params, packed), want) > 1e-2


def test_an_image_never_sees_another(twin):
    _, model, params = twin
    patches = random_images(model.config, GRIDS)
    first = patches[0].shape[0] // 4
    tokens = []
    for change in (0, 1):
        patches[1] = patches[1] + change
        packed = pack_images(patches, GRIDS, model.config.vision_config, **ONE_ROW)
        tokens.append(_tokens(model, params, packed))
    np.testing.assert_array_equal(tokens[0][:first], tokens[1][:first])
    assert relative_error(tokens[0][first:], tokens[1][first:]) > 1e-2


def test_frames_of_a_grid_are_apart(twin):
    oracle, model, params = twin
    grids = [(2, 6, 4), (1, 4, 4)]
    patches = random_images(model.config, grids)
    packed = pack_images(patches, grids, model.config.vision_config, **ONE_ROW)
    want = _oracle_tokens(oracle, patches, grids)
    assert close(_tokens(model, params, packed), want, TOLERANCE)


def test_logits_of_image_prompts_equal_transformers(twin):
    oracle, model, params = twin
    ids, valid = _rows()
    patches = random_images(model.config, GRIDS)
    want = oracle_logits(oracle, ids, valid, patches, GRIDS)
    inputs, _, _ = our_inputs(model.config, ids, valid, patches, GRIDS)
    got = _logits(model, params, inputs)
    assert close(got[valid], want[valid], TOLERANCE)
    # Controls: another image, text positions, and two images changed over.
    patches[1] = patches[1][::-1].copy()
    other = _logits(model, params, our_inputs(model.config, ids, valid, patches, GRIDS)[0])
    assert relative_error(other[0, -1:], want[0, -1:]) > 100 * TOLERANCE
    np.testing.assert_array_equal(other[1:][valid[1:]], got[1:][valid[1:]])
    flat = jnp.broadcast_to(jnp.cumsum(jnp.asarray(valid), 1)[None] - 1, (3, *ids.shape))
    other = _logits(model, params, (inputs[0], flat, *inputs[2:]))
    assert relative_error(other[valid], want[valid]) > 100 * TOLERANCE


def test_logits_of_text_equal_transformers_and_qwen2_to_the_bit(twin):
    oracle, model, params = twin
    ids, valid = batch([prompt(120, seed=5), prompt(77, seed=6)], side="right")
    want = oracle_logits(oracle, ids, valid, (), ())
    inputs, _, _ = our_inputs(model.config, ids, valid, (), ())
    got = _logits(model, params, inputs)
    assert close(got[valid], want[valid], TOLERANCE)
    text = model.config.text_config
    plain = Qwen2ForCausalLM(
        Qwen2Config(**{k: getattr(text, k) for k in Qwen2Config.__dataclass_fields__})
    )
    same = apply(plain, params["language_model"], jnp.asarray(ids), jnp.asarray(valid))
    np.testing.assert_array_equal(np.asarray(same)[valid], got[valid])


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_equal_transformers(side):
    torch = pytest.importorskip("torch")

    oracle, model, _ = tiny("untied")
    grids = [(1, 4, 12), (1, 8, 4), (1, 4, 4), (1, 2, 2)]
    ids, valid = batch([
        prompt(4, grids[0], 2, grids[1], 9), prompt(grids[2], 1), prompt(3), prompt(7, grids[3]),
    ], side)  # fmt: skip
    patches = random_images(model.config, grids)
    _, _, places = our_inputs(model.config, ids, valid, patches, grids)
    inputs = torch_inputs(ids, valid, patches, grids)
    with torch.no_grad():
        want, deltas = oracle.model.get_rope_index(
            inputs["input_ids"], inputs["mm_token_type_ids"],
            image_grid_thw=inputs["image_grid_thw"], attention_mask=inputs["attention_mask"],
        )  # fmt: skip
    np.testing.assert_array_equal(places.positions, want.numpy())
    np.testing.assert_array_equal(places.next_positions, valid.sum(1) + deltas.numpy()[:, 0])
    assert np.array_equal(places.image_slots >= 0, ids == IMAGE)
    slots = places.image_slots[places.image_slots >= 0]
    assert len(set(slots.tolist())) == len(slots)


def _place(rows, grids, **kwargs):
    config = tiny("untied")[1].config
    ids, valid = batch(rows)
    return our_inputs(config, ids, valid, random_images(config, grids), grids, **kwargs)


def test_images_and_placeholders_that_do_not_match_are_errors():
    g = (1, 4, 4)
    cut = prompt(3, g, 2)
    cut.remove(IMAGE)
    long = prompt(3, g, 2)
    long.insert(5, IMAGE)
    for rows, grids, message in (
        ([cut], [g], "row 0, token 4: 3 placeholders .* for image 0, which has 4"),
        ([long], [g], "5 placeholders"),
        ([prompt(3), prompt(2, g, g)], [g], "row 1, token 9: .* image 1, but 1 images"),
        ([prompt(2, g)], [], "0 images were given"),
        ([prompt(2, g)], [g, g], "2 images, but .* for 1"),
        ([[5, 151, 7]], [], "video"),
        ([prompt(2, g)], [(1, 3, 4)], "does not divide"),
    ):
        with pytest.raises(ImagePromptError, match=message):
            _place(rows, grids)
    with pytest.raises(ImagePromptError, match="do not fit"):
        _place([prompt(2, (1, 40, 40))], [(1, 40, 40)], windows=4)
    config = tiny("untied")[1].config
    with pytest.raises(ImagePromptError, match="its grid"):
        pack_images(random_images(config, [g]), [(1, 4, 6)], config.vision_config)
    with pytest.raises(ImagePromptError, match="0 images"):
        pack_images([], [], config.vision_config)


def test_an_image_slot_that_does_not_exist_is_not_clamped():
    _, model, params = tiny("untied")
    tokens, embeds = jnp.ones((1, 4, 64)), jnp.zeros((1, 3, 64))
    slots = jnp.array([[-1, 3, 4]])
    out = apply(model, params, embeds, slots, tokens, method="insert_images")
    assert not np.isnan(out[0, :2]).any()
    assert (out[0, :2, 0] == jnp.array([0, 1])).all()
    assert np.isnan(out[0, 2]).all()


def test_one_shape_serves_images_of_many_sizes():
    _, model, _ = tiny("untied")
    shapes = set()
    for grid in ((1, 8, 12), (1, 6, 14), (1, 4, 20), (1, 10, 10)):
        packed = pack_images(
            random_images(model.config, [grid]), [grid], model.config.vision_config
        )
        shapes.add(packed.batch.patches.shape)
    assert shapes == {(1, 6 * 16, 1176), (1, 9 * 16, 1176)}


@pytest.mark.parametrize(
    ("sizes", "rows", "windows"),
    [
        ([(4000, 5000)], 1, 1280),  # 1044 windows
        ([(252, 50400)], 1, 1600),  # of 9 x 1800 image tokens: 1350
        ([(3000, 3000)] * 3, 2, 1600),  # 729 each: each alone fits into a row of 832
    ],
    ids=["a photograph", "a ribbon", "three in two rows"],
)
def test_what_a_released_processor_lets_through_is_packed(sizes, rows, windows):
    released = {"min_pixels": 3136, "max_pixels": 12845056}
    grids = [Qwen2_5_VLImageProcessor.from_hf(released).grid_for(*size) for size in sizes]
    small = dataclasses.replace(Qwen2_5_VLVisionConfig(), patch_size=1, window_size=8)
    patches = random_images(types.SimpleNamespace(vision_config=small), grids)
    packed = pack_images(patches, grids, small, rows=rows)
    assert packed.batch.segments.shape == (rows, windows * small.window_patches)
    assert (packed.batch.segments > 0).sum() == sum(map(len, patches))
    with pytest.raises(ImagePromptError, match=f"{rows} rows of 700"):
        pack_images(patches, grids, small, rows=rows, windows=700)


def test_place_prompts_without_a_mask():
    config = tiny("untied")[1].config
    places = place_prompts(np.array([[5, 6, 7]]), None, None, config)
    assert places.positions.tolist() == [[[0, 1, 2]]] * 3
    assert places.next_positions.tolist() == [3]
