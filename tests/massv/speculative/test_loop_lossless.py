"""What the loop samples has the target's distribution; wrong rules are found out."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from massv_jax.speculative import loop
from massv_jax.speculative.accept import (
    Verdict,
    count_accepted,
    draw_tokens,
    verify_rejection,
)
from massv_jax.speculative.keys import keys_at, uniforms_at
from tests.massv.speculative.toy import decode, options, reference, request, toy_params

VOCAB, TOKENS, ROWS = 5, 3, 6000
TARGET = toy_params(VOCAB, seed=2, scale=0.5)
DRAFTER = toy_params(VOCAB, seed=2, scale=0.5, apart=0.6)
PROMPT = np.array([3, 1, 4], np.int32)
WARPS = {
    "plain": {"temperature": 1.0},
    "warped": {"temperature": 0.7, "top_k": 4, "top_p": 0.9},
}


def _warp(logits, temperature, top_k=0, top_p=1.0):
    """Temperature, top-k, top-p in numpy, from their definitions."""
    logits = logits / temperature
    if top_k:
        logits = np.where(logits < np.sort(logits)[-top_k], -np.inf, logits)
    p = np.exp(logits - logits.max())
    p /= p.sum()
    order = np.argsort(-p)
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= top_p]] = 0.0
    return p / p.sum()


def _joint(warp):
    """The exact probability of every three tokens."""
    out = {}
    valid = np.ones(3, bool)
    for tokens in itertools.product(range(VOCAB), repeat=TOKENS):
        logits = reference(TARGET, PROMPT, valid, None, tokens)
        out[tokens] = np.prod(
            [_warp(row, **warp)[t] for row, t in zip(logits, tokens, strict=True)]
        )
    return out


def _sample(warp, *, pad=-1, drafter=DRAFTER, gamma=2):
    """First three tokens of many rows of one prompt."""
    ids = np.broadcast_to(PROMPT, (ROWS, 3))
    asked = request(ids, np.ones((ROWS, 3), bool), np.zeros(ROWS, bool), None, new=6)
    opts = options(gamma, vocab=VOCAB, new=6, **warp)
    opts = dataclasses.replace(opts, pad_id=pad)  # each control is another program
    state = decode(opts, asked, TARGET, drafter)
    return np.asarray(state.tokens)[:, :TOKENS], state.counts


def _chi_square(tokens, joint):
    """(chi-square / degrees of freedom, p value); rare cells are counted together."""
    cells = {}
    for row in map(tuple, tokens.tolist()):
        cells[row] = cells.get(row, 0) + 1
    expected = np.array(list(joint.values())) * len(tokens)
    found = np.array([cells.get(k, 0) for k in joint])
    if (found[expected == 0] > 0).any():
        return np.inf, 0.0
    rare = expected < 5
    expected = np.append(expected[~rare], expected[rare].sum())
    found = np.append(found[~rare], found[rare].sum())
    used = expected > 0
    value = ((found[used] - expected[used]) ** 2 / expected[used]).sum()
    freedom = used.sum() - 1
    return value / freedom, stats.chi2.sf(value, freedom)


@pytest.mark.parametrize("name", WARPS)
def test_samples_have_the_targets_distribution(name):
    joint = _joint(WARPS[name])
    assert sum(joint.values()) == pytest.approx(1.0)
    tokens, counts = _sample(WARPS[name])
    ratio, p = _chi_square(tokens, joint)
    print(name, "chi2/dof", ratio, "p", p)
    assert p > 1e-3
    share = np.asarray(counts.accepted).sum() / np.asarray(counts.judged).sum()
    assert 0.3 < share < 0.95  # both acceptance and rejection were at work


def _always_accept(drafts, drafter_probs, target_probs, valid, keys, start):
    at = jnp.take_along_axis(target_probs, valid[:, None, None], axis=1)[:, 0]
    return Verdict(valid, draw_tokens(jnp.log(at), keys_at(keys.resample, start + valid)))


def _no_residual(drafts, drafter_probs, target_probs, valid, keys, start):
    at = start[:, None] + jnp.arange(drafts.shape[1], dtype=start.dtype)[None]
    uniforms = uniforms_at(keys.accept, at)
    n = count_accepted(drafts, drafter_probs, target_probs, valid, uniforms)
    probs = jnp.take_along_axis(target_probs, n[:, None, None], axis=1)[:, 0]
    return Verdict(n, draw_tokens(jnp.log(probs), keys_at(keys.resample, start + n)))


def _dropped_by_value(drafts, drafter_probs, target_probs, valid, keys, start):
    """Drafts that turned out unlikely are withdrawn."""
    drawn = jnp.take_along_axis(drafter_probs, drafts[:, :, None], axis=-1)[:, :, 0]
    likely = jnp.cumprod((drawn >= 0.3).astype(jnp.int32), axis=1).sum(axis=1)
    valid = jnp.minimum(valid, likely)
    return verify_rejection(drafts, drafter_probs, target_probs, valid, keys, start)


CONTROLS = {"always": _always_accept, "residual": _no_residual, "dropped": _dropped_by_value}


@pytest.mark.parametrize("name", ["always", "residual", "dropped", "soft"])
def test_wrong_rules_are_found_out(name, monkeypatch):
    if name == "soft":
        right = loop._draft_choice

        def soft(o, logits, keys, position):
            """The most likely draft, offered as if it had been drawn."""
            choice = right(o, logits, keys, position)
            return choice._replace(token=jnp.argmax(logits, axis=-1).astype(jnp.int32))

        monkeypatch.setattr(loop, "_draft_choice", soft)
    else:
        monkeypatch.setattr(loop, "verify_rejection", CONTROLS[name])
    pad = -2 - ["always", "residual", "dropped", "soft"].index(name)
    tokens, _ = _sample(WARPS["plain"], pad=pad)
    ratio, p = _chi_square(tokens, _joint(WARPS["plain"]))
    print(name, "chi2/dof", ratio, "p", p)
    assert p < 1e-9
