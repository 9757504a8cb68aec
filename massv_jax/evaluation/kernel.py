"""The compiled accept rule on recorded distributions: does what it emits follow p?

For places in real answers the target's p and the drafter's q are recorded. Three of them make a
window of two drafts: drafts are drawn from the q and judged, once for each of many keys, by the
very function that decoding calls, under the accept rule that is configured. The token emitted in
each place of the window, given that the drafts before it were kept, must have that place's
distribution p: chi-square over the most likely tokens and the rest. The same test on rules that
are wrong must fail, or it would prove nothing; one of them is right in the first place and wrong
in the others.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from core_jax.decode.sampling import SamplingRule
from massv_jax.speculative.accept import (
    Verdict,
    draw_tokens,
    keep_all,
    verify_choices,
    verify_rejection,
)
from massv_jax.speculative.drafting import Proposal
from massv_jax.speculative.keys import RowKeys, keys_at, row_keys
from massv_jax.speculative.loop import judge
from massv_jax.speculative.options import AcceptMode, DecodeOptions

GAMMA = 2  # drafts of a tested window
TOP = 50
_NUMBERS = 16_000_000  # of a block of keys: bounds the memory, not the result
_LEAST = 5.0  # expected counts of a cell, as the chi-square approximation wants
_START = 3  # of the window in its answer

Context = tuple[np.ndarray, np.ndarray]
# (drafts [B, gamma], q [B, gamma, V], p [B, gamma+1, V], valid [B], keys, start [B])
Rule = Callable[..., Verdict]


def _as_decoding(accept: AcceptMode) -> Rule:
    """What decoding calls; p and q are already warped."""

    def rule(drafts, q, p, valid, keys, start) -> Verdict:
        options = DecodeOptions(
            max_new_tokens=1, max_gamma=GAMMA, vocab_size=p.shape[-1], accept=accept,
            rule=SamplingRule(temperature=1.0),
        )  # fmt: skip
        return judge(options, Proposal(drafts, q, valid), jnp.log(p), valid, keys, start)

    return rule


def _always_accept(drafts, q, p, valid, keys, start) -> Verdict:
    """Emits q."""
    del drafts, q
    return keep_all(_choices(p, keys, start), valid)


def _no_residual(drafts, q, p, valid, keys, start) -> Verdict:
    """After a rejection draws from p instead of what p has over q."""
    verdict = verify_rejection(drafts, q, p, valid, keys, start)
    own = jnp.take_along_axis(_choices(p, keys, start), verdict.accepted[:, None], axis=1)[:, 0]
    return Verdict(verdict.accepted, own)


def _swapped_ratio(drafts, q, p, valid, keys, start) -> Verdict:
    """Judges by q / p."""
    swapped = jnp.concatenate([q, p[:, GAMMA:]], axis=1)
    verdict = verify_rejection(drafts, p[:, :GAMMA], swapped, valid, keys, start)
    honest = _no_residual(drafts, q, p, valid, keys, start)
    return Verdict(verdict.accepted, honest.token)


def _first_place_only(drafts, q, p, valid, keys, start) -> Verdict:
    """Judges every place by the first one's distributions."""
    q, p = (jnp.broadcast_to(x[:, :1], x.shape) for x in (q, p))
    return verify_rejection(drafts, q, p, valid, keys, start)


def _one_noise(drafts, q, p, valid, keys, start) -> Verdict:
    """Chooses in every place with the first one's noise."""
    del q
    first = jnp.broadcast_to(keys_at(keys.resample, start)[:, None], p.shape[:2])
    return verify_choices(drafts, draw_tokens(jnp.log(p), first), valid)


def _choices(p: Float[Array, "B T V"], keys: RowKeys, start: Int[Array, " B"]) -> Array:
    at = start[:, None] + jnp.arange(p.shape[1], dtype=jnp.int32)[None]
    return draw_tokens(jnp.log(p), keys_at(keys.resample, at))


# Of each way to accept: the rule itself, then those that must fail.
RULES: Mapping[str, Mapping[str, Rule]] = {
    "rejection": {
        "rejection": _as_decoding("rejection"), "always_accept": _always_accept,
        "no_residual": _no_residual, "swapped_ratio": _swapped_ratio,
        "first_place_only": _first_place_only,
    },
    "coupled": {
        "coupled": _as_decoding("coupled"), "always_accept": _always_accept,
        "one_noise": _one_noise,
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ChiSquare:
    """A test of counts against probabilities.

    Attributes:
      statistic: sum of (found - expected)^2 / expected.
      freedom: cells less one.
      p_value: how often chance alone gives as much.
    """

    statistic: float
    freedom: int
    p_value: float


def emitted_counts(
    accept: str, rule: str, window: Sequence[Context], *, keys: int, seed: int
) -> np.ndarray:
    """How often each token is emitted in each place of a window, int [gamma + 1, V].

    A place counts where the drafts before it were kept.

    Args:
      accept: how drafts are drawn, a key of `RULES`.
      rule: of `RULES[accept]`.
      window: gamma + 1 of (p, q), each [V]: the target's and the drafter's, after warping. The
        last q plays no part.
      keys: draws.
      seed: of the keys.
    """
    p, q = (jnp.asarray(np.stack(x)) for x in zip(*window, strict=True))
    T, V = p.shape
    block = max(1, min(keys, _NUMBERS // V))
    counts = np.zeros((T, V), np.int64)
    key = jax.random.key(seed)
    for first in range(0, keys, block):
        seeds = jnp.arange(first, first + block, dtype=jnp.int32)
        tokens, accepted = map(np.asarray, _emit(accept, rule, p, q[:GAMMA], key, seeds))
        for place in range(T):
            reached = tokens[: keys - first, place][accepted[: keys - first] >= place]
            counts[place] += np.bincount(reached, minlength=V)
    return counts


@functools.partial(jax.jit, static_argnames=("accept", "rule"))
def _emit(
    accept: str, rule: str, p: Float[Array, "T V"], q: Float[Array, "gamma V"],
    key: Key[Array, ""], seeds: Int[Array, " B"],
) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:  # fmt: skip
    """Tokens of the window, those behind the last emitted one meaning nothing; drafts kept."""
    B = seeds.shape[0]
    keys: RowKeys = row_keys(key, seeds)
    start = jnp.full((B,), _START, jnp.int32)
    valid = jnp.full((B,), GAMMA, jnp.int32)
    rows_p, rows_q = (jnp.broadcast_to(x, (B, *x.shape)) for x in (p, q))
    noise = keys.resample if accept == "coupled" else keys.draft
    at = start[:, None] + jnp.arange(GAMMA, dtype=jnp.int32)[None]
    drafts = draw_tokens(jnp.log(rows_q), keys_at(noise, at))
    verdict = RULES[accept][rule](drafts, rows_q, rows_p, valid, keys, start)
    own = jnp.arange(GAMMA + 1)[None] == verdict.accepted[:, None]
    padded = jnp.pad(drafts, ((0, 0), (0, 1)))
    return jnp.where(own, verdict.token[:, None], padded), verdict.accepted


def chi_square(counts: np.ndarray, p: np.ndarray) -> ChiSquare:
    """Against p, over its most likely tokens and the rest.

    Tokens that are expected less than five times belong to the rest.
    """
    from scipy import stats

    p = np.asarray(p, np.float64) / np.sum(p, dtype=np.float64)
    n = counts.sum()
    top = np.argsort(-p, kind="stable")[:TOP]
    top = top[p[top] * n >= _LEAST]
    expected = np.append(p[top], max(0.0, 1 - p[top].sum())) * n
    found = np.append(counts[top], n - counts[top].sum())
    if expected[-1] < _LEAST and len(top) > 1:  # too little is left for a cell of its own
        expected = np.append(expected[:-2], expected[-2:].sum())
        found = np.append(found[:-2], found[-2:].sum())
    impossible = bool(counts[p == 0].sum())
    statistic = float(np.sum((found - expected) ** 2 / np.maximum(expected, 1e-9)))
    freedom = len(expected) - 1
    if impossible:
        return ChiSquare(float("inf"), freedom, 0.0)
    if not freedom:
        return ChiSquare(0.0, 0, 1.0)
    return ChiSquare(statistic, freedom, float(stats.chi2.sf(statistic, freedom)))


def check_kernel(
    contexts: Sequence[Context], *, accept: str, keys: int, seed: int
) -> dict[str, Any]:
    """Tests the rule and those that are wrong on windows that begin with each context.

    The contexts after it, from the beginning again after the last, are a window's other places.
    The rule passes if no place's p-value, times the number of places, is below 0.001. A wrong rule
    must fail on the sum over all places (p-value below 1e-6). Without contexts nothing passes.

    Args:
      contexts: (p, q) of places.
      accept: a key of `RULES`.
      keys: draws for each window.
      seed: of the keys.
    """
    if not contexts:
        reason = "no place of a sampled answer could be recorded; ask for longer answers"
        return {"passed": False, "contexts": 0, "reason": reason}
    windows = [
        [contexts[(i + place) % len(contexts)] for place in range(GAMMA + 1)]
        for i in range(len(contexts))
    ]
    results = {
        rule: _test_rule(accept, rule, windows, keys=keys, seed=seed) for rule in RULES[accept]
    }
    return {
        "passed": all(r["as_it_must"] for r in results.values()), "contexts": len(contexts),
        "accept": accept, "places": GAMMA + 1, "keys": keys,
        "tvd": [float(0.5 * np.abs(p - q).sum()) for p, q in contexts],
        "rules": results,
    }  # fmt: skip


def _test_rule(
    accept: str, rule: str, windows: Sequence[Sequence[Context]], *, keys: int, seed: int
) -> dict[str, Any]:
    from scipy import stats

    tests = []
    for i, window in enumerate(windows):
        counts = emitted_counts(accept, rule, window, keys=keys, seed=seed + i)
        tests += [chi_square(counts[place], p) for place, (p, _) in enumerate(window)]
    statistic = sum(t.statistic for t in tests)
    freedom = sum(t.freedom for t in tests)
    together = float(stats.chi2.sf(statistic, freedom)) if freedom else 1.0
    least = min(1.0, min(t.p_value for t in tests) * len(tests))
    honest = rule == accept
    return {
        "must": "pass" if honest else "fail",
        "as_it_must": least >= 1e-3 if honest else together < 1e-6,
        "p_value": together, "least_p_value_corrected": least,
        "statistic": statistic if np.isfinite(statistic) else None, "freedom": freedom,
        "p_values": [t.p_value for t in tests],
    }  # fmt: skip
