"""The accept rules: worked examples, edges, greedy rows, padded vocabularies, sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from core_jax.decode import SamplingRule
from core_jax.decode.sampling import warp_logits
from massv_jax.speculative import row_keys, verify_choices, verify_rejection, warp_window
from massv_jax.speculative.accept import count_accepted, next_token_probs

_count = jax.jit(count_accepted)
_following = jax.jit(next_token_probs)
_warp = jax.jit(warp_window, static_argnums=1)
ALMOST_ONE = np.nextafter(np.float32(1), np.float32(0))


def _one_draft(p, q, draft, u, valid=1):
    """Kept or not, and what would follow a refusal, for one draft of one row."""
    drafts = np.array([[draft]], np.int32)
    p = np.array([[p, p]], np.float32)
    q = None if q is None else np.array([[q]], np.float32)
    offered = np.array([valid], np.int32)
    kept = int(_count(drafts, q, p, offered, np.array([[u]], np.float32))[0])
    return kept, np.array(_following(drafts, q, p, offered, np.zeros((1,), np.int32)))[0]


def test_the_worked_example():
    p, q = [0.5, 0.3, 0.2], [0.2, 0.2, 0.6]
    for draft in (0, 1):
        assert _one_draft(p, q, draft, ALMOST_ONE)[0] == 1
    assert _one_draft(p, q, 2, 0.333)[0] == 1
    assert _one_draft(p, q, 2, 0.334)[0] == 0
    np.testing.assert_allclose(_one_draft(p, q, 2, 0.9)[1], [0.75, 0.25, 0], atol=1e-6)
    # A draft that was not drawn: kept with probability p.
    assert _one_draft(p, None, 2, 0.199)[0] == 1
    assert _one_draft(p, None, 2, 0.201)[0] == 0
    np.testing.assert_allclose(_one_draft(p, None, 2, 0.9)[1], [0.625, 0.375, 0], atol=1e-6)


@pytest.mark.parametrize(("p", "q", "draft", "u", "kept", "following"), [
    pytest.param([0, 0, 0.5, 0.5], [0.5, 0.5, 0, 0], 0, 0.0, 0, [0, 0, 0.5, 0.5], id="disjoint"),
    pytest.param([0, 1, 0, 0], [0.4, 0.6, 0, 0], 0, 0.0, 0, [0, 1, 0, 0], id="p a point, missed"),
    pytest.param([0, 1, 0, 0], [0.4, 0.6, 0, 0], 1, ALMOST_ONE, 1, [0, 1, 0, 0], id="p a point"),
    pytest.param([0, 1, 0, 0], [0, 1, 0, 0], 1, ALMOST_ONE, 1, [0, 1, 0, 0], id="both one point"),
    pytest.param([0.1, 0.2, 0.3, 0.4], [0, 0, 1, 0], 2, 0.29, 1, [1 / 7, 2 / 7, 0, 4 / 7],
                 id="q a point"),
    pytest.param([0.25] * 4, [0.25] * 4, 3, ALMOST_ONE, 1, [0.25] * 4, id="no residual"),
    pytest.param([0.5, 0.5, 0, 0], [0, 0.5, 0.5, 0], 0, 0.0, 0, [1, 0, 0, 0], id="q(x) is 0"),
    pytest.param([0.5, 0.5, 0, 0], [0.5, 0, 0, 0.5], 3, 0.0, 0, [0, 1, 0, 0], id="p(x) is 0"),
])  # fmt: skip
def test_edges(p, q, draft, u, kept, following):
    got, probs = _one_draft(p, q, draft, u)
    assert got == kept
    np.testing.assert_allclose(probs, following, atol=1e-6)


def test_a_residual_below_normal_numbers_is_none():
    p, q = [1.0, 1e-39, 0, 0], [1.0, 0, 1e-39, 0]
    np.testing.assert_array_equal(_one_draft(p, q, 2, 0.5)[1], np.array(p, np.float32))


def test_what_is_not_offered_is_not_looked_at():
    p = [0.1, 0.2, 0.3, 0.4]
    for draft in (-1, 0, 2**30):
        kept, probs = _one_draft(p, [1, 0, 0, 0], draft, 0.0, valid=0)
        assert kept == 0
        np.testing.assert_array_equal(probs, np.array(p, np.float32))
    # Offered all the same, what is no token is refused and takes nothing away.
    for draft in (-1, 2**30):
        kept, probs = _one_draft(p, None, draft, 0.0)
        assert kept == 0
        np.testing.assert_allclose(probs, p, rtol=1e-6)


def test_a_narrower_drafter_counts_as_zero_beyond_its_vocabulary():
    p, q = [0.1, 0.2, 0.3, 0.4], [0.6, 0.4]
    kept, probs = _one_draft(p, q, 0, 0.5)
    padded = _one_draft(p, [*q, 0, 0], 0, 0.5)
    assert kept == padded[0] == 0
    np.testing.assert_array_equal(probs, padded[1])
    np.testing.assert_allclose(probs, [0, 0, 3 / 7, 4 / 7], rtol=1e-6)
    # 0.3 of p lies beyond: were it renormalised away, 0.16 would be kept here.
    assert _one_draft([0.1, 0.6, 0.3], q, 0, 0.17)[0] == 0
    assert _one_draft([0.1, 0.6, 0.3], q, 0, 0.16)[0] == 1


def test_a_wider_drafter_is_refused_beyond_the_targets_vocabulary():
    p, q = [0.5, 0.5], [0.25, 0.25, 0.5]
    kept, probs = _one_draft(p, q, 2, 0.0)
    assert kept == 0
    np.testing.assert_allclose(probs, [0.5, 0.5])
    assert _one_draft(p, q, 1, ALMOST_ONE)[0] == 1


def _some_distribution(rng, size):
    kind = rng.integers(4)
    if kind == 0:  # a point
        return np.eye(size)[rng.integers(size)]
    p = rng.dirichlet(np.full(size, rng.choice([0.1, 1.0, 10.0])))
    if kind == 1:  # a part excluded, as by top-k
        p = np.where(rng.random(size) < 0.5, 0, p)
        p[rng.integers(size)] += 1e-3
    if kind == 2:  # hardly any left
        p = p**8 + 1e-30
    return p / p.sum()


def _reference(drafts, q, p, valid, u):
    """One row, in loops."""
    q = np.pad(q, ((0, 0), (0, p.shape[1] - q.shape[1])))
    n = 0
    while n < valid and q[n, drafts[n]] > 0 and u[n] * q[n, drafts[n]] < p[n, drafts[n]]:
        n += 1
    if n == valid:
        return n, p[n]
    residual = np.maximum(p[n] - q[n], 0)
    return n, residual / residual.sum() if residual.sum() > 1e-37 else p[n]


def test_random_windows_against_loops():
    rng = np.random.default_rng(0)
    B, gamma, V, U = 600, 4, 7, 5
    p = np.zeros((B, gamma + 1, V), np.float32)
    q = np.zeros((B, gamma, U), np.float32)
    for b in range(B):
        p[b] = [_some_distribution(rng, V) for _ in range(gamma + 1)]
        q[b] = [_some_distribution(rng, U) for _ in range(gamma)]
        if rng.random() < 0.3:  # a drafter that knows the target
            q[b] = p[b, :gamma, :U] / np.maximum(p[b, :gamma, :U].sum(-1, keepdims=True), 1e-30)
    drafts = rng.integers(0, U, (B, gamma)).astype(np.int32)
    likely = np.argmax(q, axis=-1)
    drafts = np.where(rng.random((B, gamma)) < 0.7, likely, drafts).astype(np.int32)
    valid = rng.integers(0, gamma + 1, B).astype(np.int32)
    u = (rng.integers(0, 2**23, (B, gamma)) / 2**23).astype(np.float32)
    accepted = np.array(_count(drafts, q, p, valid, u))
    probs = np.array(_following(drafts, q, p, valid, accepted))
    assert set(accepted) == set(range(gamma + 1))
    assert np.isfinite(probs).all()
    assert (probs >= 0).all()
    np.testing.assert_allclose(probs.sum(axis=1), 1, atol=1e-5)
    for b in range(B):
        n, want = _reference(drafts[b], q[b], p[b], valid[b], u[b])
        assert accepted[b] == n
        np.testing.assert_allclose(probs[b], want, atol=1e-5)


RULES = [
    SamplingRule(temperature=0.0),
    SamplingRule(temperature=0.7, top_k=5),
    SamplingRule(temperature=1.3, top_p=0.7),
    SamplingRule(temperature=0.6, top_k=6, top_p=0.8),
]


@pytest.mark.parametrize("rule", RULES)
def test_windows_are_warped_as_single_tokens_are(rule):
    logits = np.random.default_rng(0).normal(0, 2, (5, 3, 12)).astype(np.float32)
    got = np.array(jax.nn.softmax(_warp(logits, rule), axis=-1))
    by_row = np.array(jax.nn.softmax(_warp(logits, rule, np.full(5, rule.temperature)), axis=-1))
    for i in range(3):
        if rule.greedy:
            want = np.eye(12)[logits[:, i].argmax(axis=-1)]
        else:
            want = jax.nn.softmax(warp_logits(jnp.asarray(logits[:, i]), rule), axis=-1)
        np.testing.assert_allclose(got[:, i], want, atol=1e-6)
        np.testing.assert_allclose(by_row[:, i], want, atol=1e-6)


def test_temperatures_of_rows_do_not_mix():
    logits = np.random.default_rng(1).normal(0, 2, (3, 2, 12)).astype(np.float32)
    rule = SamplingRule(temperature=1.0, top_k=6)
    mixed = np.array(_warp(logits, rule, np.array([0.0, 0.5, 2.0])))
    for b, t in enumerate([0.0, 0.5, 2.0]):
        alone = np.array(_warp(logits, SamplingRule(temperature=t, top_k=6)))
        np.testing.assert_allclose(mixed[b], alone[b], rtol=1e-6)
    assert (np.isfinite(mixed).sum(axis=-1) == [[1, 1], [6, 6], [6, 6]]).all()


def test_tiny_temperatures_of_rows_are_right():
    logits = np.tile(np.float32([25.0, 90.0, -40.0, 3.0]), (3, 2, 1))
    alone = _warp(logits, SamplingRule(temperature=1e-38))
    mixed = _warp(logits, SamplingRule(temperature=1.0), np.float32([1e-38, 1e-30, 1e-3]))
    for warped in (alone, mixed):
        probs = np.array(jax.nn.softmax(warped, axis=-1))
        np.testing.assert_array_equal(probs, np.tile(np.eye(4)[1], (3, 2, 1)))


def test_bfloat16_logits_are_warped_in_float32():
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 2, (5, 3, 12)), jnp.bfloat16)
    rule = SamplingRule(temperature=0.7, top_p=0.9)
    got = _warp(logits, rule)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, _warp(logits.astype(jnp.float32), rule))
    ties = np.array(jax.nn.softmax(_warp(jnp.round(logits), SamplingRule()), axis=-1))
    first = np.array(jnp.round(logits), np.float32).argmax(axis=-1)  # numpy takes the first
    np.testing.assert_array_equal(ties, np.eye(12)[first])


def test_a_repetition_penalty_is_refused():
    with pytest.raises(ValueError, match=r"repetition_penalty .* does not go with speculative"):
        warp_window(jnp.zeros((1, 1, 4)), SamplingRule(repetition_penalty=1.2))


@jax.jit
def _verify(drafts, drafter_logits, target_logits, valid, temperature, seeds, start):
    rule = SamplingRule(temperature=1.0)
    q = jax.nn.softmax(warp_window(drafter_logits, rule), axis=-1)
    p = jax.nn.softmax(warp_window(target_logits, rule, temperature), axis=-1)
    keys = row_keys(jax.random.key(0), seeds)
    return verify_rejection(drafts, q, p, valid, keys, start)


def _mixed_batch(B=64, gamma=3, V=16):
    rng = np.random.default_rng(0)
    target = np.round(rng.normal(0, 1.5, (B, gamma + 1, V))).astype(np.float32)  # many ties
    # Logits that a softmax in float32 cannot tell apart.
    target[0, 0, :2] = [20.0, np.nextafter(np.float32(20), np.float32(21))]
    drafter = (target[:, :gamma] + rng.normal(0, 0.5, (B, gamma, V))).astype(np.float32)
    drafts = np.where(rng.random((B, gamma)) < 0.7, target[:, :gamma].argmax(-1),
                      rng.integers(0, V, (B, gamma))).astype(np.int32)  # fmt: skip
    valid = rng.integers(0, gamma + 1, B).astype(np.int32)
    drafts[0], valid[0] = 1, gamma
    temperature = np.where(np.arange(B) % 2, 1.0, 0.0).astype(np.float32)
    start = rng.integers(0, 50, B).astype(np.int32)
    return drafts, drafter, target, valid, temperature, np.arange(B), start


def test_greedy_rows_among_others_are_the_argmax_chain():
    batch = _mixed_batch()
    drafts, _, target, valid, temperature, *_ = batch
    accepted, token = map(np.array, _verify(*batch))
    best = target.argmax(axis=-1)  # the first of equals
    for b in np.flatnonzero(temperature == 0):
        n = 0
        while n < valid[b] and drafts[b, n] == best[b, n]:
            n += 1
        assert accepted[b] == n
        assert token[b] == best[b, n]
    greedy = temperature == 0
    assert set(accepted[greedy]) == {0, 1, 2, 3}
    assert best[0, 0] == 1
    assert accepted[0] >= 1
    # The rows that sample do not follow it.
    followed = token == np.take_along_axis(best, accepted[:, None], axis=1)[:, 0]
    assert 0 < followed[~greedy].mean() < 0.9
    matched = jax.jit(verify_choices)(drafts, best.astype(np.int32), valid)
    np.testing.assert_array_equal(np.array(matched.accepted)[greedy], accepted[greedy])
    np.testing.assert_array_equal(np.array(matched.token)[greedy], token[greedy])


def test_rows_and_vocabulary_may_be_sharded():
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    batch = _mixed_batch()
    want = _verify(*batch)

    def put(x):
        spec = ("data", None, "tensor") if x.ndim == 3 else ("data",)
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    got = _verify(*map(put, batch))
    np.testing.assert_array_equal(got.accepted, want.accepted)
    np.testing.assert_array_equal(got.token, want.token)
