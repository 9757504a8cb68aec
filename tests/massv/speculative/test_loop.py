"""The loop around a toy network: what it emits, counts and forgets."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from massv_jax.speculative import StopReason
from massv_jax.speculative.drafting import LookupPrompt, LookupProposer, NetworkProposer
from massv_jax.speculative.loop import Params, Program, advance, start
from massv_jax.speculative.options import MAX_GAMMA
from tests.massv.speculative.toy import (
    ToyDecoder,
    decode,
    options,
    reference,
    request,
    rows,
    toy_params,
)

VOCAB, NEW = 23, 16
TARGET = toy_params(VOCAB, seed=3)
NEAR = toy_params(VOCAB, seed=3, apart=0.3)  # a drafter that is right now and then
BATCH = rows(5)


def _tokens(state):
    return np.asarray(state.tokens), np.asarray(state.lengths)


def test_plain_greedy_equals_the_reference_without_a_cache():
    state = decode(options(0), request(*BATCH), TARGET)
    tokens, lengths = _tokens(state)
    assert lengths.tolist() == [NEW] * 5
    assert len(np.unique(tokens)) > 12
    ids, valid, has_image, images = BATCH
    for row in range(5):
        image = images[row] if has_image[row] else None
        logits = reference(TARGET, ids[row], valid[row], image, tokens[row])
        np.testing.assert_array_equal(logits.argmax(-1), tokens[row])
    np.testing.assert_array_equal(state.counts.rounds, [NEW - 1] * 5)


@pytest.mark.parametrize("gamma", [1, 3, 5, MAX_GAMMA])
def test_speculative_greedy_equals_plain(gamma):
    """With an end token that many answers reach inside a window, and limits of their own."""
    limits = [NEW, 9, NEW, 1, 0]
    want, _ = _tokens(decode(options(0), request(*BATCH), TARGET))
    eos = int(want[0, 7])
    for eos_ids in ((), (eos,)):
        asked = request(*BATCH, limits=limits)
        plain = decode(options(0, eos_ids=eos_ids), asked, TARGET)
        got = decode(options(gamma, eos_ids=eos_ids), asked, TARGET, NEAR)
        np.testing.assert_array_equal(got.tokens, plain.tokens)
        np.testing.assert_array_equal(got.lengths, plain.lengths)
        np.testing.assert_array_equal(got.reason, plain.reason)
        accepted = np.asarray(got.counts.accepted).sum()
        assert 0 < accepted < np.asarray(got.counts.judged).sum()
        emitted = np.asarray(got.counts.emitted)
        np.testing.assert_array_equal(emitted + (np.array(limits) > 0), got.lengths)
        assert np.asarray(got.counts.rounds).sum() < np.asarray(plain.counts.rounds).sum()
    assert np.asarray(got.reason)[0] == StopReason.END_TOKEN
    assert np.asarray(got.lengths)[0] <= 8
    assert (np.asarray(got.tokens)[1, 9:] == -1).all()


def test_coupled_samples_equal_plain_samples():
    rule = {"temperature": 0.9, "top_k": 9, "top_p": 0.95}
    plain = decode(options(0, **rule), request(*BATCH), TARGET)
    got = decode(options(3, accept="coupled", **rule), request(*BATCH), TARGET, NEAR)
    np.testing.assert_array_equal(got.tokens, plain.tokens)
    accepted = np.asarray(got.counts.accepted).sum()
    assert 0 < accepted < np.asarray(got.counts.judged).sum()
    other = decode(options(0, **rule), request(*BATCH, run=1), TARGET)
    assert (np.asarray(other.tokens) != np.asarray(plain.tokens)).mean() > 0.3


@pytest.mark.parametrize("mode", ["greedy", "rejection", "coupled"])
def test_a_drafter_equal_to_the_target_is_always_right(mode):
    """What losslessness cannot show: a wrong cache of the drafter costs acceptance only."""
    rule = {} if mode == "greedy" else {"temperature": 1.0, "accept": mode}
    new = 1 + 4 * 3
    got = decode(options(3, new=new, **rule), request(*BATCH, new=new), TARGET, TARGET)
    np.testing.assert_array_equal(got.counts.accepted, np.full((5, 3), 3))
    np.testing.assert_array_equal(got.counts.rounds, np.full(5, 3))


def test_on_policy_answers_are_the_drafters_with_a_token_of_the_targets_after_each_window():
    gamma = 3
    got = decode(options(gamma, accept="on_policy"), request(*BATCH), TARGET, NEAR)
    tokens, lengths = _tokens(got)
    assert lengths.tolist() == [NEW] * 5
    ids, valid, has_image, images = BATCH
    by_target = np.arange(NEW) % (gamma + 1) == 0  # the first token comes with the prompt
    by_target[-1] = True  # the last possible token
    near = {**NEAR, "tower": TARGET["tower"]}  # which is shared
    differ = 0
    for row in range(5):
        image = images[row] if has_image[row] else None
        args = ids[row], valid[row], image, tokens[row]
        own, drafted = (reference(p, *args).argmax(-1) for p in (TARGET, near))
        np.testing.assert_array_equal(tokens[row], np.where(by_target, own, drafted))
        differ += (own != drafted)[~by_target].sum()
    assert differ > 0


def test_a_row_does_not_depend_on_its_neighbours():
    rule = {"temperature": 1.0, "top_p": 0.9}
    together = decode(options(3, **rule), request(*BATCH), TARGET, NEAR)
    order = np.array([3, 1])
    some = [x[order] for x in BATCH]
    alone = decode(options(3, **rule), request(*some, seeds=order), TARGET, NEAR)
    np.testing.assert_array_equal(alone.tokens, np.asarray(together.tokens)[order])
    # Control: with another seed a row says something else.
    other = decode(options(3, **rule), request(*some, seeds=order + 9), TARGET, NEAR)
    assert (np.asarray(other.tokens) != np.asarray(alone.tokens)).any()


def test_short_calls_and_changing_gammas_give_what_one_call_gives():
    opts = options(5)
    whole = decode(opts, request(*BATCH), TARGET, NEAR)
    program = Program(ToyDecoder(), NetworkProposer(ToyDecoder(), VOCAB), opts)
    params = Params(TARGET, NEAR)
    state = start(program, params, request(*BATCH))
    seen = []
    for gamma in [0, 5, 2, 5, 2, 0] * 4:
        state = advance(program, params, state, jnp.int32(2), gamma=gamma)
        seen.append(int(np.asarray(state.lengths).sum()))
        ends = np.asarray(state.target.end) - np.asarray(state.drafter.end)
        assert not ends.any()  # both caches hold the same tokens
    assert seen == sorted(seen)
    assert len(set(seen)) > 4
    np.testing.assert_array_equal(state.tokens, whole.tokens)


def test_a_state_after_rounds_is_that_of_recomputing_the_text():
    """Roll-back: the caches' live tokens are prompt and answer but for the newest token."""
    state = decode(options(4), request(*BATCH), TARGET, NEAR, rounds=3)
    ids, valid, *_ = BATCH
    lengths = np.asarray(state.lengths)
    assert len(set(lengths.tolist())) > 1
    for cache in (state.target, state.drafter):
        for row in range(5):
            want = [*ids[row][valid[row]], *np.asarray(state.tokens)[row, : lengths[row] - 1]]
            assert int(cache.end[row]) == len(want)
            np.testing.assert_array_equal(np.asarray(cache.tokens)[row, : len(want)], want)


def test_low_confidence_stops_drafting_and_changes_nothing_else():
    want = decode(options(5), request(*BATCH), TARGET, NEAR)
    got = decode(options(5, min_confidence=0.8), request(*BATCH), TARGET, NEAR)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    judged = [np.asarray(s.counts.judged).sum(axis=0) for s in (got, want)]
    assert 0 < judged[0][1:].sum() < judged[1][1:].sum()
    # The first draft is always offered, but in front of the last possible token.
    assert judged[0][0] >= np.asarray(got.counts.rounds).sum() - 5


def test_vocabularies_of_different_width():
    """A narrower drafter cannot say some tokens; a wider one must not be believed."""
    narrow = {**NEAR, "head": NEAR["head"][:, :12], "table": NEAR["table"][:12]}
    pad = jnp.full((NEAR["head"].shape[0], 6), 50.0)
    wide = {**NEAR, "head": jnp.concatenate([NEAR["head"], pad], axis=1)}
    for rule in ({}, {"temperature": 1.0, "accept": "coupled"}):
        plain = decode(options(0, **rule), request(*BATCH), TARGET)
        assert (np.asarray(plain.tokens) >= 12).any()
        for drafter in (narrow, wide):
            got = decode(options(3, **rule), request(*BATCH), TARGET, drafter)
            np.testing.assert_array_equal(got.tokens, plain.tokens)
            assert np.asarray(got.counts.accepted).sum() > 0


def test_lookup_finds_what_was_said_before():
    ids, valid, has_image, images = BATCH
    said = np.asarray(decode(options(0), request(*BATCH), TARGET).tokens)
    # The prompt to look in holds the answer: everything after the first match is right.
    prompt = LookupPrompt(jnp.asarray(said), jnp.full((5,), NEW, jnp.int32))
    asked = request(ids, valid, has_image, images, draft=prompt)
    found = decode(options(4), asked, TARGET, proposer=LookupProposer(max_ngram=3))
    np.testing.assert_array_equal(found.tokens, said)
    assert np.asarray(found.counts.rounds).sum() < 5 * NEW // 2
    nothing = LookupPrompt(jnp.full((5, 3), 22, jnp.int32), jnp.zeros((5,), jnp.int32))
    asked = request(ids, valid, has_image, images, draft=nothing)
    again = decode(options(4), asked, TARGET, proposer=LookupProposer(max_ngram=3, min_ngram=3))
    np.testing.assert_array_equal(again.tokens, said)


def test_options_that_cannot_be():
    with pytest.raises(ValueError, match="gamma is 17"):
        options(17)
    with pytest.raises(ValueError, match="accept is 'maybe'"):
        options(2, accept="maybe")
    with pytest.raises(ValueError, match="at least 1"):
        options(2, new=0)
    with pytest.raises(ValueError, match="no probability"):
        options(2, min_confidence=1.5)
    with pytest.raises(ValueError, match="repetition_penalty"):
        dataclasses.replace(
            options(2), rule=dataclasses.replace(options(2).rule, repetition_penalty=1.2)
        )


def test_the_last_token_of_a_budget_is_the_targets_own():
    """No draft is offered in its place, so no window runs past the limit."""
    limits = [2, 3, 4, 5, 6]
    got = decode(options(3), request(*BATCH, limits=limits), TARGET, TARGET)
    np.testing.assert_array_equal(got.lengths, limits)
    assert set(np.asarray(got.reason).tolist()) == {StopReason.LENGTH}
    np.testing.assert_array_equal(np.asarray(got.counts.judged).sum(1), [0, 1, 2, 3, 3])
    np.testing.assert_array_equal(got.counts.accepted, got.counts.judged)


def test_the_random_rows_of_this_file_are_ragged():
    assert len(set(BATCH[1].sum(1).tolist())) > 2
    assert jax.devices()[0].platform == "cpu"
