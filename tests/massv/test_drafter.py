"""Drafters against the stock architecture, their decoders, their odd ids, their pooling."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_jax.data.gemma3_processor import Gemma3Processor
from core_jax.data.qwen2_5_vl_processor import Qwen2_5_VLProcessor
from core_jax.decode.qwen2_5_vl import ImagePrompt
from core_jax.models import gemma3, qwen2, qwen2_5_vl
from core_jax.partition import count_parameters
from massv_jax.draft_prompts import PoolingPrompt, draft_view, pooling_leaders
from massv_jax.drafter import Drafter
from massv_jax.drafter_config import DrafterConfig, PrefixConfig, mrope_section
from massv_jax.drafter_model import within_vocabulary
from massv_jax.exporting import whole_model
from massv_jax.loading import load_merger, load_tower, make_drafter
from massv_jax.projector import init_projector
from tests.massv.tiny_pairs import pictures
from tests.oracle import close, relative_error


@functools.partial(jax.jit, static_argnames=("drafter", "method"))
def run(drafter, method, *args):
    return getattr(drafter, method)(*args)


def qwen_inputs(pair, rows=2, side="right", length=80):
    """A batch with an image in each row but the last."""
    processor = Qwen2_5_VLProcessor.from_pretrained(pair.target)
    images = [[p] for p in pictures(rows - 1)] + [[]]
    texts = [
        processor.render([{"role": "user", "content": [{"type": "image"}] * len(row)
                           + [{"type": "text", "text": "what is it?"}]}])
        for row in images
    ]  # fmt: skip
    return processor(texts, images, rows=rows, length=length, padding_side=side)


def packed(inputs):
    b = inputs.images.batch
    return tuple(map(jnp.asarray, (b.patches, b.positions, b.segments)))


def row_slots(places, units):
    """Slots within a row of the packing, of slots over all rows."""
    slots = np.asarray(places.image_slots)
    return jnp.asarray(np.where(slots >= 0, slots % units, -1))


@pytest.fixture(scope="module")
def qwen(qwen_pair):
    return make_drafter(qwen_pair.target, qwen_pair.language_model), load_tower(qwen_pair.target)


def test_merger_drafter_is_the_stock_model(qwen_pair, qwen):
    parts, tower = qwen
    inputs = qwen_inputs(qwen_pair)
    drafter, params = parts.drafter, parts.params
    features = run(drafter, "features", tower, *packed(inputs))
    tokens = run(drafter, "image_tokens", params, features)
    ids, valid = jnp.asarray(inputs.ids), jnp.asarray(inputs.valid)
    positions = jnp.asarray(inputs.places.positions)
    slots = row_slots(inputs.places, tokens.shape[1])
    hidden = run(drafter, "hidden", params, ids, valid, tokens, slots, positions)
    ours = hidden @ drafter.head_table(params).T
    model, whole = whole_model(drafter.config, params["projector"], params["language_model"], tower)
    args = (ids, positions, jnp.asarray(inputs.places.image_slots), *packed(inputs), valid)
    want = jax.jit(model.apply)({"params": whole}, *args)
    keep = np.asarray(inputs.valid)
    assert close(np.asarray(ours)[keep], np.asarray(want)[keep], 1e-5)
    # The control: without the image the first row says something else, the last the same.
    blind = run(drafter, "hidden", params, ids, valid, tokens * 0, slots, positions)
    blind = np.asarray(blind @ drafter.head_table(params).T)
    assert relative_error(blind[0][keep[0]], np.asarray(want)[0][keep[0]]) > 1e-2
    assert close(blind[1][keep[1]], np.asarray(want)[1][keep[1]], 1e-5)


def test_merger_starts_from_the_target_s(qwen_pair, qwen):
    parts, _ = qwen
    target = load_merger(qwen_pair.target)
    ours = parts.params["projector"]
    np.testing.assert_array_equal(ours["mlp_0"]["kernel"], target["mlp_0"]["kernel"])
    assert ours["mlp_2"]["kernel"].shape != target["mlp_2"]["kernel"].shape
    fresh = init_projector(parts.drafter.config, jax.random.key(0))
    assert np.abs(fresh["mlp_0"]["kernel"] - ours["mlp_0"]["kernel"]).max() > 0.1


def test_mlp_reads_the_target_s_merged_tokens(qwen_pair, qwen):
    _, tower = qwen
    parts = make_drafter(qwen_pair.target, qwen_pair.language_model, kind="mlp")
    inputs = qwen_inputs(qwen_pair)
    features = run(parts.drafter, "features", tower, *packed(inputs))
    tokens = run(parts.drafter, "image_tokens", parts.params, features)
    target = qwen2_5_vl.Qwen2_5_VLForConditionalGeneration(config=parts.drafter.config.target)
    merger = load_merger(qwen_pair.target)
    merged = target.apply({"params": {"visual": {"merger": merger}}}, features,
                          method="merge_vision")  # fmt: skip
    p = parts.params["projector"]
    want = jax.nn.gelu(merged @ p["fc1"]["kernel"] + p["fc1"]["bias"][None, None],
                       approximate=False)  # fmt: skip
    want = want @ p["fc2"]["kernel"] + p["fc2"]["bias"][None, None]
    assert close(tokens, want, 1e-5)
    assert tokens.shape[-1] == 24


@pytest.mark.parametrize("pooling", [1, 2])
def test_decoder_continues_as_the_whole_sequence(qwen_pair, qwen, pooling):
    """Prefill and a window of a cached decoder against `hidden`, for drafters with both prompts."""
    made, tower = qwen
    config = dataclasses.replace(made.drafter.config, pooling=pooling)
    drafter, params = Drafter(config), made.params
    inputs = qwen_inputs(qwen_pair, side="left", length=None)
    images = packed(inputs)
    features = run(drafter, "features", tower, *images)
    view = draft_view(config, inputs.ids, inputs.valid, inputs.places, inputs.images)
    leaders = jnp.asarray(pooling_leaders(config, inputs.images))
    prompt = ImagePrompt.at(view.ids, view.places, valid=view.valid)
    if pooling > 1:
        assert view.ids.shape[1] < inputs.ids.shape[1]
        prompt = PoolingPrompt(prompt, leaders)
    decoder, weights = drafter.decoder, drafter.decoder_params(params)
    more = jnp.asarray([[7, 30, 319], [9, 8, 11]])  # 319: an id that only the target has
    first, state = decoder.begin(weights, prompt, features, max_new_tokens=4, window=3)
    after, _ = decoder.extend(weights, state, more)
    got = np.concatenate([first[:, None], after], axis=1)
    # The same as one sequence, padded on the left.
    units = leaders.shape[1]
    own = leaders - jnp.arange(2)[:, None] * units
    tokens = run(drafter, "image_tokens", params, features, own if pooling > 1 else None)
    ids = jnp.concatenate([jnp.asarray(view.ids), more], axis=1)
    valid = jnp.concatenate([jnp.asarray(view.valid), jnp.ones((2, 3), bool)], axis=1)
    slots = jnp.pad(row_slots(view.places, units), ((0, 0), (0, 3)), constant_values=-1)
    following = view.places.next_positions[None, :, None] + np.arange(3)[None, None]
    positions = jnp.concatenate(
        [jnp.asarray(view.places.positions), jnp.asarray(np.repeat(following, 3, axis=0))], axis=2
    )
    hidden = run(drafter, "hidden", params, ids, valid, tokens, slots, positions)
    want = (hidden @ drafter.head_table(params).T)[:, -4:]
    assert close(got, want, 1e-4)
    assert np.isfinite(got).all()
    wrong = positions.at[:, :, -3:].add(5)
    off = run(drafter, "hidden", params, ids, valid, tokens, slots, wrong)
    assert relative_error((off @ drafter.head_table(params).T)[:, -3:], want[:, -3:]) > 1e-2


def test_pooling_takes_means_of_squares_and_keeps_the_target_s_positions(qwen_pair, qwen):
    made, tower = qwen
    config = dataclasses.replace(made.drafter.config, pooling=2)
    inputs = qwen_inputs(qwen_pair)
    plain = run(made.drafter, "image_tokens", made.params,
                run(made.drafter, "features", tower, *packed(inputs)))  # fmt: skip
    leaders = pooling_leaders(config, inputs.images)
    pooled = run(Drafter(config), "image_tokens", made.params,
                 run(made.drafter, "features", tower, *packed(inputs)),
                 jnp.asarray(leaders - np.arange(2)[:, None] * leaders.shape[1]))  # fmt: skip
    (_, rows, columns), slots = inputs.images.grids[0], inputs.images.token_slots[0]
    cells = slots.reshape(rows // 2, columns // 2)
    assert cells.shape == (5, 3)  # odd on purpose: cut squares
    square = np.asarray(plain)[0][cells[2:4, 0:2].reshape(-1)].mean(axis=0)
    np.testing.assert_allclose(pooled[0, cells[2, 0]], square, rtol=1e-5, atol=1e-6)
    edge = np.asarray(plain)[0][cells[4, 2]]
    np.testing.assert_allclose(pooled[0, cells[4, 2]], edge, rtol=1e-5, atol=1e-6)
    view = draft_view(config, inputs.ids, inputs.valid, inputs.places, inputs.images, side="right")
    assert (view.places.image_slots[0] >= 0).sum() == 3 * 2
    taken = view.source[0][view.valid[0]]
    np.testing.assert_array_equal(
        view.places.positions[:, 0, : len(taken)], inputs.places.positions[:, 0, taken]
    )


def test_text_drafters_see_no_image_and_no_marker(qwen_pair):
    parts = make_drafter(qwen_pair.target, qwen_pair.language_model, kind="text")
    inputs = qwen_inputs(qwen_pair)
    view = draft_view(parts.drafter.config, inputs.ids, inputs.valid, side="right")
    assert not np.isin(view.ids[view.valid], [3, 4, 5]).any()
    assert view.valid[0].sum() == (inputs.valid[0] & ~np.isin(inputs.ids[0], [3, 4, 5])).sum()
    assert view.places is None
    assert parts.params["projector"] == {}


@pytest.fixture(scope="module")
def gemma(gemma_pair):
    return make_drafter(gemma_pair.target, gemma_pair.language_model), load_tower(gemma_pair.target)


def gemma_inputs(pair, side="right", length=80):
    processor = Gemma3Processor.from_pretrained(pair.target)
    images = [[pictures()[0]], []]
    texts = [
        processor.render([{"role": "user", "content": [{"type": "image"}] * len(row)
                           + [{"type": "text", "text": "what is it?"}]}])
        for row in images
    ]  # fmt: skip
    return processor(texts, images, length=length, padding_side=side, max_images=1)


@pytest.mark.parametrize("pooling", [1, 2, 4])
def test_gemma_drafter_is_the_stock_model(gemma_pair, gemma, pooling):
    """Also with a placeholder outside the table, and an image block that sees itself."""
    made, tower = gemma
    config = dataclasses.replace(made.drafter.config, pooling=pooling)
    drafter, params = Drafter(config), made.params
    inputs = gemma_inputs(gemma_pair)
    features = run(drafter, "features", tower, jnp.asarray(inputs.pixel_values[:, 0]))
    tokens = run(drafter, "image_tokens", params, features)
    assert tokens.shape == (2, 16 // pooling**2, 24)
    view = draft_view(config, inputs.ids, inputs.valid, side="right")
    assert (view.ids == config.image_token_id).sum() == 16 // pooling**2
    ids, valid = jnp.asarray(view.ids), jnp.asarray(view.valid)
    hidden = run(drafter, "hidden", params, ids, valid, tokens)
    ours = np.asarray(hidden @ drafter.head_table(params).T)
    model, whole = whole_model(config, params["projector"], params["language_model"], tower)
    want = jax.jit(model.apply)({"params": whole}, ids, jnp.asarray(inputs.pixel_values[:, 0]),
                                valid)  # fmt: skip
    assert close(ours[view.valid], np.asarray(want)[view.valid], 1e-5)
    clamped = jnp.where(ids >= config.vocab_size, config.vocab_size - 1, ids)  # what a gather does
    wrong = run(drafter, "hidden", params, clamped, valid, tokens)
    wrong = np.asarray(wrong @ drafter.head_table(params).T)
    assert relative_error(wrong[0][view.valid[0]], np.asarray(want)[0][view.valid[0]]) > 1e-2


def test_gemma_projector_is_neither_zero_nor_transposed(gemma):
    made, _ = gemma
    matrix = np.asarray(made.params["projector"]["mm_input_projection_weight"])
    assert matrix.shape == (32, 24)
    assert np.abs(matrix).max() > 0.05


def test_prefix_drafter_reads_embeddings_in_front_of_text():
    target = PrefixConfig(num_embeddings=5, embed_dim=12, vocab_size=70)
    text = qwen2.Qwen2Config(vocab_size=64, hidden_size=16, num_attention_heads=2,
                             num_hidden_layers=1, intermediate_size=8)  # fmt: skip
    drafter = Drafter(DrafterConfig.for_pair(target, text))
    assert drafter.config.kind == "prefix"
    key = jax.random.key(1)
    params = {"projector": init_projector(drafter.config, key),
              "language_model": qwen2.FAMILY.init_params(qwen2.Qwen2ForCausalLM(config=text),
                                                         jax.random.key(2))}  # fmt: skip
    context = jax.random.normal(jax.random.key(3), (2, 5, 12))
    ids = jnp.asarray([[3, 4, 69], [5, 6, 7]])
    from core_jax.decode.prefix import PrefixPrompt

    prompt = PrefixPrompt(ids, jnp.ones((2, 3), bool), jnp.ones((2,), bool))
    first, _ = drafter.decoder.begin(drafter.decoder_params(params), prompt, context,
                                     max_new_tokens=2, window=1)  # fmt: skip
    tokens = drafter.image_tokens(params, context)
    full = jnp.concatenate([jnp.zeros((2, 5), ids.dtype), ids], axis=1)
    slots = jnp.broadcast_to(jnp.where(jnp.arange(8) < 5, jnp.arange(8), -1)[None], (2, 8))
    hidden = run(drafter, "hidden", params, full, jnp.ones((2, 8), bool), tokens, slots)
    want = hidden[:, -1] @ drafter.head_table(params).T
    assert close(first, want, 1e-5)
    assert np.isfinite(np.asarray(first)).all()


def test_ids_outside_the_table_become_zero():
    ids = jnp.asarray([[0, 9, 10, 262144]])
    assert within_vocabulary(ids, 10).tolist() == [[0, 9, 0, 0]]


def test_sizes_of_released_projectors():
    vl, lm = qwen2_5_vl.Qwen2_5_VLConfig.qwen2p5_vl_7b(), qwen2.Qwen2Config.qwen2p5_1p5b()
    gemma_1b = gemma3.Gemma3Config.drafter_1b().text_config
    counts = {}
    for kind, target, text in (("merger", vl, lm), ("mlp", vl, lm),
                               ("gemma", gemma3.Gemma3Config.gemma3_12b(), gemma_1b)):  # fmt: skip
        config = DrafterConfig.for_pair(target, text, kind=kind)
        tree = jax.eval_shape(lambda key, c=config: init_projector(c, key), jax.random.key(0))
        counts[kind] = count_parameters(tree) / 1e6
    assert {k: round(v, 2) for k, v in counts.items()} == {
        "merger": 34.09, "mlp": 7.87, "gemma": 1.33,
    }  # fmt: skip
    assert DrafterConfig.for_pair(vl, lm).text.mrope_section == (16, 24, 24)
    assert mrope_section((16, 24, 24), 64) == (8, 12, 12)


def test_pairs_that_do_not_go_together_are_refused():
    vl, lm = qwen2_5_vl.Qwen2_5_VLConfig.qwen2p5_vl_7b(), qwen2.Qwen2Config.qwen2p5_1p5b()
    gemma_1b = gemma3.Gemma3Config.drafter_1b().text_config
    with pytest.raises(ValueError, match="one family"):
        DrafterConfig.for_pair(vl, gemma_1b)
    with pytest.raises(ValueError, match=r"kinds for it: .*gemma"):
        DrafterConfig.for_pair(gemma3.Gemma3Config.gemma3_12b(), gemma_1b, kind="merger")
    with pytest.raises(ValueError, match="1, 2 or 4"):
        DrafterConfig.for_pair(vl, lm, pooling=3)
    with pytest.raises(ValueError, match="no grid"):
        DrafterConfig.for_pair(vl, lm, kind="text", pooling=2)
    with pytest.raises(ValueError, match="is no target"):
        DrafterConfig.for_pair(lm, lm)
