"""Beam search against transformers, token for token."""

import jax.numpy as jnp
import numpy as np
import pytest

from core_jax.decode import beam_search
from core_jax.decode.adapters import CausalDecoder, EmbeddingPrefix, TokenPrefix
from tests.core.decode.tiny_qwen2 import PAD, left_padded, tiny_qwen2


def oracle_beams(oracle, max_new_tokens, *, eos, **options):
    torch = pytest.importorskip("torch")

    inputs = {k: torch.tensor(np.array(options.pop(k))) for k in list(options) if k in _INPUTS}
    start = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    out = oracle.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=eos or None,
        pad_token_id=PAD, output_scores=True, return_dict_in_generate=True, **options,
    )  # fmt: skip
    tokens = out.sequences[:, start:].numpy()
    room = max_new_tokens - tokens.shape[1]
    return np.pad(tokens, ((0, 0), (0, room)), constant_values=PAD), out.sequences_scores.numpy()


_INPUTS = ("input_ids", "inputs_embeds", "attention_mask")

CASES = {
    # Several options change which hypothesis wins; std changes how soon hypotheses end.
    "until_full": dict(early_stopping=True, eos=(2,), length_penalty=1.0),
    "heuristic": dict(early_stopping=False, eos=(2, 5, 7), length_penalty=1.0),
    "never": dict(early_stopping="never", eos=(2, 5), length_penalty=2.0),
    "short": dict(early_stopping="never", eos=(2, 5, 7), length_penalty=-1.0),
    "no_penalty": dict(early_stopping=False, eos=(2,), length_penalty=0.0),
    "no_end": dict(early_stopping=True, eos=(), length_penalty=1.0),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("std", [0.12, 0.3])
def test_beams_equal_transformers(case, std):
    oracle, model, params = tiny_qwen2(std=std)
    options = dict(CASES[case])
    eos = options.pop("eos")
    ids, valid = left_padded(batch=5, length=8, seed=3)
    want, scores = oracle_beams(
        oracle, 20, eos=list(eos), num_beams=4, input_ids=ids.astype(np.int64),
        attention_mask=valid * 1, **options,
    )  # fmt: skip
    assert len(np.unique(want)) >= 10
    prefix = TokenPrefix(jnp.asarray(ids), jnp.asarray(valid))
    out = beam_search(
        CausalDecoder(model), params, prefix, max_new_tokens=20, eos_ids=eos, pad_id=PAD,
        num_beams=4, **options,
    )  # fmt: skip
    np.testing.assert_array_equal(out.tokens, want)
    np.testing.assert_allclose(out.scores, scores, rtol=1e-4, atol=1e-4)
    ends = np.isin(want, eos)
    np.testing.assert_array_equal(out.finished, ends.any(axis=1))
    np.testing.assert_array_equal(
        out.lengths, np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, 20)
    )


def test_beams_from_embeddings_and_how_options_matter():
    oracle, model, params = tiny_qwen2(std=0.12)
    embeds = np.random.default_rng(1).normal(size=(4, 7, 32)).astype(np.float32)
    inputs = dict(inputs_embeds=embeds, attention_mask=np.ones((4, 7), int))
    outputs = {}
    for penalty in (1.0, -1.0):
        options = dict(num_beams=3, early_stopping=True, length_penalty=penalty)
        want, _ = oracle_beams(oracle, 16, eos=[2, 5, 9], **options, **inputs)
        out = beam_search(
            CausalDecoder(model), params, EmbeddingPrefix(jnp.asarray(embeds)),
            max_new_tokens=16, eos_ids=(2, 5, 9), pad_id=PAD, **options,
        )  # fmt: skip
        np.testing.assert_array_equal(out.tokens, want)
        outputs[penalty] = want
    assert not np.array_equal(outputs[1.0], outputs[-1.0])


def test_options_out_of_range_are_refused():
    _, model, params = tiny_qwen2()
    prefix = TokenPrefix(jnp.asarray(left_padded()[0]))
    with pytest.raises(ValueError, match="early_stopping"):
        beam_search(
            CausalDecoder(model), params, prefix, max_new_tokens=4, early_stopping="always"
        )
    with pytest.raises(ValueError, match="num_beams 0"):
        beam_search(CausalDecoder(model), params, prefix, max_new_tokens=4, num_beams=0)
