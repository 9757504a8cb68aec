"""Decoding on a (data, tensor) mesh of 8 devices says what it says on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_jax.decode.gemma3 import Gemma3Decoder, Gemma3Prompt
from core_jax.decode.qwen2_5_vl import ImagePrompt, ImageTextDecoder
from core_jax.decode.sampling import SamplingRule
from core_jax.models import gemma3_text
from core_jax.models.qwen2_5_vl import (
    FAMILY,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLVisionConfig,
    pack_images,
    place_prompts,
)
from core_jax.sharding import DEFAULT_RULES, make_mesh, param_shardings
from massv_jax.speculative import StopReason
from massv_jax.speculative.drafting import NetworkProposer
from massv_jax.speculative.loop import Params, Program, Request, advance, start
from massv_jax.speculative.options import DecodeOptions
from tests.massv.speculative.test_networks import near

NEW, VOCAB = 16, 64
CONFIG = Qwen2_5_VLConfig(
    text_config=Qwen2_5_VLTextConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, mrope_section=(1, 2, 1),
    ),
    vision_config=Qwen2_5_VLVisionConfig(
        depth=1, hidden_size=32, intermediate_size=48, num_heads=4, patch_size=2, window_size=8,
        out_hidden_size=32, fullatt_block_indexes=(0,),
    ),
    image_token_id=60, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63,
)  # fmt: skip
GEMMA = gemma3_text.Gemma3TextConfig(
    vocab_size=VOCAB, hidden_size=32, num_attention_heads=4, num_key_value_heads=4, head_dim=8,
    query_pre_attn_scalar=8, num_hidden_layers=3, intermediate_size=48, sliding_window=8,
    sliding_window_pattern=2, max_position_embeddings=128,
)  # fmt: skip
GRIDS = [(1, 4, 6), (1, 6, 4), (1, 2, 6)]  # the last row is text


def _request(run):
    rng = np.random.default_rng(0)
    images = [rng.normal(size=(np.prod(g), 24)).astype(np.float32) for g in GRIDS]
    packed = pack_images(images, GRIDS, CONFIG.vision_config, rows=4)
    ids = rng.integers(0, 59, (4, 14)).astype(np.int32)
    for row, grid in zip(ids, GRIDS, strict=False):
        row[-3 - np.prod(grid) // 4 :] = [62, *[60] * (np.prod(grid) // 4), 63, 7]
    valid = np.arange(14)[None] >= np.array([0, 2, 1, 6])[:, None]
    prompt = ImagePrompt.at(ids, place_prompts(ids, valid, packed, CONFIG), valid=valid)
    return Request(
        prompt=prompt, images=packed.batch, draft_prompt=prompt, key=jax.random.key(run),
        row_seeds=jnp.arange(4), limits=jnp.asarray([NEW, 5, NEW, 11], jnp.int32),
    )  # fmt: skip


def _gemma_request(run):
    """Ragged prompts of text, longer than the local layers' window."""
    ids = np.random.default_rng(0).integers(5, VOCAB, (4, 14)).astype(np.int32)
    valid = np.arange(14)[None] >= np.array([0, 2, 1, 6])[:, None]
    prompt = Gemma3Prompt(ids, valid)
    return Request(
        prompt=prompt, images=None, draft_prompt=prompt, key=jax.random.key(run),
        row_seeds=jnp.arange(4), limits=jnp.asarray([NEW, 5, NEW, 11], jnp.int32),
    )  # fmt: skip


def _network(family):
    """(family, model, decoder, request)."""
    if family == "gemma":
        gemma = gemma3_text.Gemma3ForCausalLM(config=GEMMA)
        return gemma3_text.FAMILY, gemma, Gemma3Decoder(gemma), _gemma_request
    qwen = Qwen2_5_VLForConditionalGeneration(CONFIG)
    return FAMILY, qwen, ImageTextDecoder(qwen), _request


def _answers(family, params, gamma, *, eos_ids=(), temperature=0.0, accept="rejection"):
    _, _, decoder, request = _network(family)
    options = DecodeOptions(
        max_new_tokens=NEW, max_gamma=gamma, vocab_size=VOCAB, eos_ids=eos_ids, pad_id=-1,
        rule=SamplingRule(temperature=temperature), accept=accept,
    )  # fmt: skip
    program = Program(decoder, NetworkProposer(decoder, VOCAB) if gamma else None, options)
    state = start(program, params, request(3))
    state = advance(program, params, state, jnp.int32(99), gamma=gamma)
    return jax.device_get((state.tokens, state.lengths, state.reason, state.counts.accepted))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "gamma", "temperature", "accept"),
    [
        ("qwen", 0, 0.0, "rejection"), ("qwen", 3, 0.0, "rejection"),
        ("qwen", 3, 1.0, "rejection"), ("qwen", 3, 1.0, "coupled"),
        ("gemma", 3, 0.0, "rejection"), ("gemma", 3, 1.0, "rejection"),
        ("gemma", 3, 1.0, "coupled"),
    ],
)  # fmt: skip
def test_sharded_answers_equal_those_of_one_device(family, gamma, temperature, accept):
    rng = np.random.default_rng(0)
    found, model, _, _ = _network(family)
    target = jax.tree.map(
        lambda x: jnp.float32(rng.normal(0, 0.1 if x.shape[0] == VOCAB else 0.7, x.shape)),
        found.abstract_params(model),
    )
    params = Params(target, near(target, 0.03) if gamma else None)
    how = {"temperature": temperature, "accept": accept}
    free, *_ = _answers(family, params, gamma, **how)
    eos = (int(free[0, 6]),)
    want = _answers(family, params, gamma, eos_ids=eos, **how)
    assert len(np.unique(free)) >= 10
    assert set(want[2].tolist()) == {StopReason.END_TOKEN, StopReason.LENGTH}
    assert len(set(want[1].tolist())) >= 3  # rows finish at different times
    if gamma:
        assert want[3].sum() > 0

    mesh = make_mesh({"data": 2, "tensor": 4})
    shardings = param_shardings(target, found.param_axes, DEFAULT_RULES, mesh)
    spread = Params(*(p if p is None else jax.device_put(p, shardings) for p in params))
    tables = [x for x in jax.tree.leaves(spread.target) if x.shape == (VOCAB, 32)]
    assert {t.addressable_shards[0].data.shape for t in tables} == {(VOCAB // 4, 32)}
    with jax.set_mesh(mesh):
        got = _answers(family, spread, gamma, eos_ids=eos, **how)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)
