"""The compiled accept rule on recorded distributions: does what it emits follow p?

For a place in a real answer the target's p and the drafter's q are recorded. Then drafts are drawn
from q and judged, once for each of many keys, by the very function that decoding calls. The first
token emitted must have the distribution p: chi-square over the most likely tokens and the rest.
The same test on rules that are wrong must fail, or it would prove nothing.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from massv_jax.speculative.accept import Verdict, draw_tokens, verify_rejection
from massv_jax.speculative.keys import RowKeys, keys_at, row_keys

TOP = 50
_NUMBERS = 16_000_000  # of a block of keys: bounds the memory, not the result
_LEAST = 5.0  # expected counts of a cell, as the chi-square approximation wants

Rule = Callable[..., Verdict]


def _always_accept(drafts, q, p, valid, keys, start) -> Verdict:
    """Emits q."""
    verdict = verify_rejection(drafts, q, p, valid, keys, start)
    return Verdict(jnp.ones_like(verdict.accepted), verdict.token)


def _no_residual(drafts, q, p, valid, keys, start) -> Verdict:
    """After a rejection draws from p instead of what p has over q."""
    verdict = verify_rejection(drafts, q, p, valid, keys, start)
    place = keys_at(keys.resample, start + verdict.accepted)
    own = draw_tokens(jnp.log(p[:, 0]), place)
    return Verdict(verdict.accepted, jnp.where(verdict.accepted == 0, own, verdict.token))


def _swapped_ratio(drafts, q, p, valid, keys, start) -> Verdict:
    """Judges by q / p."""
    swapped = jnp.concatenate([q, p[:, 1:]], axis=1)
    verdict = verify_rejection(drafts, p[:, :1], swapped, valid, keys, start)
    honest = verify_rejection(drafts, q, p, valid, keys, start)
    return Verdict(verdict.accepted, honest.token)


RULE = "rejection"
RULES: Mapping[str, Rule] = {
    RULE: verify_rejection, "always_accept": _always_accept, "no_residual": _no_residual,
    "swapped_ratio": _swapped_ratio,
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


def emitted_counts(rule: str, p: np.ndarray, q: np.ndarray, *, keys: int, seed: int) -> np.ndarray:
    """How often each token is emitted first, int [V].

    Args:
      rule: of `RULES`.
      p: [V], the target's, after warping.
      q: [V], the drafter's.
      keys: draws.
      seed: of the keys.
    """
    V = len(p)
    block = max(1, min(keys, _NUMBERS // V))
    counts = np.zeros(V, np.int64)
    key = jax.random.key(seed)
    for first in range(0, keys, block):
        seeds = jnp.arange(first, first + block, dtype=jnp.int32)
        tokens = np.asarray(_emit(rule, jnp.asarray(p), jnp.asarray(q), key, seeds))
        counts += np.bincount(tokens[: keys - first], minlength=V)
    return counts


@functools.partial(jax.jit, static_argnames=("rule",))
def _emit(
    rule: str, p: Float[Array, " V"], q: Float[Array, " V"], key: Key[Array, ""],
    seeds: Int[Array, " B"],
) -> Int[Array, " B"]:  # fmt: skip
    B, V = seeds.shape[0], p.shape[0]
    keys: RowKeys = row_keys(key, seeds)
    zero = jnp.zeros((B,), jnp.int32)
    rows_p, rows_q = (jnp.broadcast_to(x, (B, V)) for x in (p, q))
    draft = draw_tokens(jnp.log(rows_q), keys_at(keys.draft, zero))
    # What follows the window plays no part in its first token.
    target = jnp.stack([rows_p, rows_p], axis=1)
    verdict = RULES[rule](
        draft[:, None], rows_q[:, None], target, jnp.ones((B,), jnp.int32), keys, zero
    )
    return jnp.where(verdict.accepted > 0, draft, verdict.token)


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
    contexts: list[tuple[np.ndarray, np.ndarray]], *, keys: int, seed: int
) -> dict[str, Any]:
    """Tests the rule and those that are wrong on (p, q) of each context.

    The rule passes if no context's p-value, times the number of contexts, is below 0.001. A wrong
    rule must fail on the sum over contexts (p-value below 1e-6).
    """
    from scipy import stats

    results: dict[str, Any] = {}
    for rule in RULES:
        tests = [
            chi_square(emitted_counts(rule, p, q, keys=keys, seed=seed + i), p)
            for i, (p, q) in enumerate(contexts)
        ]
        statistic = sum(t.statistic for t in tests)
        freedom = sum(t.freedom for t in tests)
        together = float(stats.chi2.sf(statistic, freedom)) if freedom else 1.0
        least = min(1.0, min(t.p_value for t in tests) * len(tests))
        passed = least >= 1e-3 if rule == RULE else together < 1e-6
        results[rule] = {
            "must": "pass" if rule == RULE else "fail", "as_it_must": passed,
            "p_value": together, "least_p_value_corrected": least,
            "statistic": statistic if np.isfinite(statistic) else None, "freedom": freedom,
            "p_values": [t.p_value for t in tests],
        }  # fmt: skip
    return {
        "passed": all(r["as_it_must"] for r in results.values()), "contexts": len(contexts),
        "keys": keys, "tvd": [float(0.5 * np.abs(p - q).sum()) for p, q in contexts],
        "rules": results,
    }  # fmt: skip
