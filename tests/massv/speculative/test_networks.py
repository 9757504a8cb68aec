"""Real networks behind the loop: drafted answers are plain ones, token for token, in float32."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_jax.decode.prefix import PrefixDecoder, PrefixPrompt
from core_jax.decode.sampling import SamplingRule
from core_jax.decode.target import load_target
from core_jax.models.qwen2 import FAMILY, Qwen2Config, Qwen2ForCausalLM
from massv_jax.projector import MlpProjector
from massv_jax.speculative.decoder import SpeculativeDecoder
from massv_jax.speculative.drafting import NetworkProposer
from massv_jax.speculative.loop import Params, Program, Request, advance, start
from massv_jax.speculative.options import DecodeOptions
from tests.massv.tiny_pairs import pictures

NEW = 24
# Ragged: two images, text only, one image; with answers the local layers' window is crossed.
QUESTIONS = ["what is it? a red circle", "two cats", "describe the image in detail " * 2]


def near(params, scale, seed=7):
    """Parameters a little off: a drafter that is right now and then."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: x * jnp.asarray(1 + scale * rng.standard_normal(x.shape), x.dtype), params
    )


@functools.cache
def _target(path):
    target = load_target(path)
    if target.model_type == "gemma3":
        # A tied head finds large embeddings again, whatever the layers do: one word for ever.
        table = target.params["language_model"]["embed_tokens"]
        table["embedding"] = table["embedding"] * 0.1
    return target


def _images():
    a, b, c = pictures(3)
    return [[a, b], None, [c]]


def _decode(target, drafter, gamma=3, **options):
    decoder = SpeculativeDecoder(target, drafter, prompt_lengths=(64, 96, 128))
    return decoder.generate(_images(), QUESTIONS, max_new_tokens=NEW, gamma=gamma, **options)


def _equal_to_plain(target, drafter, gammas, least_distinct):
    """Greedy answers with and without an end inside a window."""
    endless = dataclasses.replace(target, eos_ids=())
    plain = _decode(endless, None)
    print("distinct", len(np.unique(plain.tokens)))
    assert len(np.unique(plain.tokens)) >= least_distinct
    ends = dataclasses.replace(target, eos_ids=(int(plain.tokens[0, 9]), int(plain.tokens[1, 6])))
    for gamma in gammas:
        made = _decode(endless, drafter, gamma)
        np.testing.assert_array_equal(made.tokens, plain.tokens)
        s = made.statistics.total
        print("gamma", gamma, made.statistics.summary())
        assert 0 < s.accepted.sum() < s.judged.sum()
    gamma = gammas[-1]
    cut, want = _decode(ends, drafter, gamma), _decode(ends, None)
    np.testing.assert_array_equal(cut.tokens, want.tokens)
    np.testing.assert_array_equal(cut.lengths, want.lengths)
    assert cut.finished[:2].all()
    assert cut.lengths[0] <= 10


@pytest.mark.parametrize("family", ["qwen", "gemma"])
def test_a_prompt_without_a_token_is_refused(family, qwen_pair, gemma_pair):
    """There would be no place whose logits are those of a first token."""
    target = load_target({"qwen": qwen_pair, "gemma": gemma_pair}[family].target)
    frontend, limits = target.frontend, {"lengths": [64]}
    assert frontend.prepare(["a cat"], [[]], **limits).valid.any()
    for texts in ([""], ["a cat", ""]):
        with pytest.raises(ValueError, match=f"prompts of rows .{len(texts) - 1}. have no tokens"):
            frontend.prepare(texts, [[]] * len(texts), **limits)


@pytest.mark.slow
def test_qwen2_5_vl_drafted_greedily_says_the_same(qwen_pair):
    target = _target(qwen_pair.target)
    drafter = dataclasses.replace(target, params=near(target.params, 0.04))
    _equal_to_plain(target, drafter, [3], 12)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen", "gemma"])
def test_other_windows_and_a_drafter_for_text(family, qwen_pair, gemma_pair):
    pair = {"qwen": qwen_pair, "gemma": gemma_pair}[family]
    target = _target(pair.target)
    drafter = dataclasses.replace(target, params=near(target.params, 0.04))
    _equal_to_plain(target, drafter, [1, 5], 12)
    plain = _decode(target, None)
    text = _decode(target, load_target(pair.language_model), 2)
    np.testing.assert_array_equal(text.tokens, plain.tokens)


@pytest.mark.slow
def test_gemma3_drafted_greedily_says_the_same_across_its_window(gemma_pair):
    target = _target(gemma_pair.target)
    assert target.eos_ids == (1, 4)
    drafter = dataclasses.replace(target, params=near(target.params, 0.04))
    _equal_to_plain(target, drafter, [3], 12)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen", "gemma"])
def test_a_network_drafting_for_itself_is_always_right(family, qwen_pair, gemma_pair):
    """At temperature 0 and 1: caches, positions and images of both sides are the same."""
    pair = {"qwen": qwen_pair, "gemma": gemma_pair}[family]
    target = dataclasses.replace(_target(pair.target), eos_ids=())
    for temperature in (0.0, 1.0):
        made = _decode(target, target, 3, temperature=temperature)
        s = made.statistics
        np.testing.assert_array_equal(s.accepted, s.judged)
        assert (s.rounds == 6).all()  # 23 tokens, four at a time


@functools.cache
def _prefix_model():
    config = Qwen2Config(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        rope_theta=1e4,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config=config)
    rng = np.random.default_rng(3)
    lm = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.asarray(
            rng.normal(path[-1].key == "scale", 0.35, x.shape), jnp.float32
        ),
        FAMILY.abstract_params(model),
    )
    projector = MlpProjector(32)
    shapes = jax.eval_shape(projector.init, jax.random.key(0), jnp.zeros((1, 1, 20)))["params"]
    projection = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape), jnp.float32), shapes
    )
    decoder = PrefixDecoder(projector, model)
    return decoder, {"projector": projection, "language_model": lm}


def _prefix_answers(gamma, eos_ids=(), rows=slice(None), temperature=0.0, drafter=None):
    decoder, params = _prefix_model()
    rng = np.random.default_rng(4)
    vision = rng.normal(size=(4, 7, 20)).astype(np.float32)
    ids = rng.integers(0, 61, (4, 5)).astype(np.int32)
    valid = np.arange(5)[None] >= np.array([5, 2, 0, 5])[:, None]  # two rows of an image alone
    prompt = PrefixPrompt(ids[rows], valid[rows], np.array([True, True, False, True])[rows])
    options = DecodeOptions(
        max_new_tokens=NEW, max_gamma=gamma, vocab_size=61, eos_ids=eos_ids, pad_id=-1,
        rule=SamplingRule(temperature=temperature), accept="coupled",
    )  # fmt: skip
    proposer = NetworkProposer(decoder, 61) if gamma else None
    program = Program(decoder, proposer, options)
    seeds = jnp.arange(4, dtype=jnp.int32)[rows]
    request = Request(
        prompt, vision[rows], prompt, jax.random.key(1), seeds, jnp.full(seeds.shape, NEW)
    )
    params = Params(params, drafter)
    state = start(program, params, request)
    return advance(program, params, state, jnp.int32(100), gamma=gamma)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_captioner_with_a_prefix_drafted_says_the_same(temperature):
    """As VLV's: an image is a prefix, prompts are empty or short, one row has no image."""
    _, params = _prefix_model()
    drafter = near(params, 0.05)
    plain = _prefix_answers(0, temperature=temperature)
    tokens = np.asarray(plain.tokens)
    assert len(np.unique(tokens)) >= 12
    made = _prefix_answers(3, temperature=temperature, drafter=drafter)
    np.testing.assert_array_equal(made.tokens, tokens)
    counts = made.counts
    assert 0 < np.asarray(counts.accepted).sum() < np.asarray(counts.judged).sum()
    eos = (int(tokens[0, 8]),)
    cut = _prefix_answers(3, eos, temperature=temperature, drafter=drafter)
    end = int(np.flatnonzero(tokens[0] == eos[0])[0]) + 1
    assert int(cut.lengths[0]) == end
    np.testing.assert_array_equal(np.asarray(cut.tokens)[0, :end], tokens[0, :end])


@pytest.mark.slow
def test_a_row_of_a_network_does_not_depend_on_its_neighbours():
    _, params = _prefix_model()
    drafter = near(params, 0.05)
    together = _prefix_answers(3, temperature=1.0, drafter=drafter)
    alone = _prefix_answers(3, rows=slice(1, 2), temperature=1.0, drafter=drafter)
    np.testing.assert_array_equal(alone.tokens[0], np.asarray(together.tokens)[1])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_captioner_drafting_for_itself_is_always_right(temperature):
    _, params = _prefix_model()
    made = _prefix_answers(3, temperature=temperature, drafter=params)
    np.testing.assert_array_equal(made.counts.accepted, made.counts.judged)
    assert (np.asarray(made.counts.rounds) == 6).all()  # 23 tokens, four at a time
    other = _prefix_answers(3, temperature=temperature, drafter=near(params, 0.05))
    assert (np.asarray(other.counts.rounds) > 6).any()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen", "gemma"])
def test_a_row_with_images_does_not_depend_on_its_neighbours(family, qwen_pair, gemma_pair):
    """Neither its padding nor the rows of packed images that it shares change its text."""
    target = _target({"qwen": qwen_pair, "gemma": gemma_pair}[family].target)
    target = dataclasses.replace(target, eos_ids=())
    drafter = dataclasses.replace(target, params=near(target.params, 0.04))
    together = _decode(target, drafter, temperature=1.0)
    decoder = SpeculativeDecoder(target, drafter, prompt_lengths=(64, 96, 128))
    for row in range(3):
        alone = decoder.generate(
            _images()[row : row + 1], QUESTIONS[row : row + 1], max_new_tokens=NEW, gamma=3,
            temperature=1.0, row_seeds=[row],
        )  # fmt: skip
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
    assert len({tuple(row) for row in together.tokens.tolist()}) == 3
