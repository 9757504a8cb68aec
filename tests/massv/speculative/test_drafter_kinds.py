"""Every kind of drafter takes its place in the loop: answers stay the target's."""

import dataclasses
import functools

import numpy as np
import pytest

from core_jax.decode.target import load_target
from massv_jax.binding import BindingError
from massv_jax.loading import make_drafter
from massv_jax.speculative.decoder import SpeculativeDecoder
from tests.massv.tiny_pairs import pictures

QUESTIONS = ["what is it? a red circle", "two cats"]
KINDS = [("qwen", "merger", 1), ("qwen", "merger", 2), ("qwen", "mlp", 1), ("qwen", "text", 1),
         ("gemma", "gemma", 1), ("gemma", "gemma", 2), ("gemma", "text", 1)]  # fmt: skip


@functools.cache
def _plain(path):
    target = dataclasses.replace(load_target(path), eos_ids=())
    return target, _answers(SpeculativeDecoder(target, None, prompt_lengths=(64, 96)))


def _answers(decoder):
    images = [pictures(1), None]
    return decoder.generate(images, QUESTIONS, max_new_tokens=10, gamma=2)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind", "pooling"), KINDS)
def test_answers_stay_the_targets(family, kind, pooling, qwen_pair, gemma_pair):
    pair = {"qwen": qwen_pair, "gemma": gemma_pair}[family]
    target, plain = _plain(pair.target)
    parts = make_drafter(pair.target, pair.language_model, kind=kind, pooling=pooling)
    made = _answers(SpeculativeDecoder(target, parts, prompt_lengths=(64, 96)))
    np.testing.assert_array_equal(made.tokens, plain.tokens)
    # Fresh drafters are seldom right: each round emits the target's own token at least.
    assert (made.statistics.rounds >= 3).all()
    np.testing.assert_array_equal(made.statistics.emitted, 9)


@pytest.mark.slow
def test_a_drafter_of_another_family_is_refused(qwen_pair, gemma_pair):
    target, _ = _plain(qwen_pair.target)
    with pytest.raises(BindingError, match="another tokenizer"):
        SpeculativeDecoder(target, load_target(gemma_pair.language_model))
