"""What is emitted follows p exactly: every outcome summed up, and rollouts with real keys."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from massv_jax.speculative import (
    StopReason,
    append_tokens,
    cut_window,
    draw_tokens,
    keys_at,
    offered_drafts,
    row_keys,
    verify_choices,
    verify_rejection,
)
from massv_jax.speculative.accept import count_accepted, next_token_probs

# Probabilities are sixths and q is at most three of them, so every p/q is a multiple of 1/6 and
# six numbers, the middles of the sixths, stand for all uniform numbers without an error.
V, PARTS = 3, 6
GRID = (np.arange(PARTS) + 0.5) / PARTS


def _sixths(rng, largest=PARTS):
    while True:
        cuts = np.sort(rng.integers(0, PARTS + 1, V - 1))
        parts = np.diff([0, *cuts, PARTS])
        if parts.max() <= largest:
            return parts / PARTS


def _trees(gamma, seed):
    """p and q after every prefix: for each i an array [V**i, V]."""
    rng = np.random.default_rng(seed)
    p = [np.array([_sixths(rng) for _ in range(V**i)]) for i in range(gamma + 1)]
    q = [np.array([_sixths(rng, 3) for _ in range(V**i)]) for i in range(gamma)]
    return p, q


def _windows(drafts, p, q):
    """The window that each row of drafts [D, gamma] meets: p [D, gamma+1, V], q, prefixes."""
    D, gamma = drafts.shape
    prefix = np.zeros((D, gamma + 1), int)
    for i in range(gamma):
        prefix[:, i + 1] = prefix[:, i] * V + drafts[:, i]
    p = np.stack([p[i][prefix[:, i]] for i in range(gamma + 1)], axis=1)
    q = np.stack([q[i][prefix[:, i]] for i in range(gamma)], axis=1)
    return p, q, prefix


@jax.jit
def _kernel(drafts, q, p, valid, uniforms):
    accepted = count_accepted(drafts, q, p, valid, uniforms)
    return accepted, next_token_probs(drafts, q, p, valid, accepted)


def _swapped_ratio(drafts, q, p, valid, uniforms):
    gamma = drafts.shape[1]
    swapped = jnp.concatenate([q, p[:, gamma:]], axis=1)
    accepted = count_accepted(drafts, p[:, :gamma], swapped, valid, uniforms)
    return accepted, next_token_probs(drafts, q, p, valid, accepted)


def _no_residual(drafts, q, p, valid, uniforms):
    accepted = count_accepted(drafts, q, p, valid, uniforms)
    return accepted, next_token_probs(drafts, q, p, accepted, accepted)


def _always(drafts, q, p, valid, uniforms):
    return valid, next_token_probs(drafts, q, p, valid, valid)


def _outcomes(gamma, q, *, drafting="sample"):
    """Every draft and every combination of uniform numbers, with their probability."""
    drafts = np.array(list(itertools.product(range(V), repeat=gamma)))
    soft = _windows(drafts, [np.zeros((V**i, V)) for i in range(gamma + 1)], q)[1]
    if drafting == "sample":
        probs = np.take_along_axis(soft, drafts[..., None], axis=2)[..., 0]
    else:
        probs = (drafts == soft.argmax(axis=-1)).astype(float)
    weight = probs.prod(axis=1)
    drafts, weight = drafts[weight > 0], weight[weight > 0]
    uniforms = np.array(list(itertools.product(GRID, repeat=gamma)), np.float32)
    D, U = len(drafts), len(uniforms)
    drafts, weight = np.repeat(drafts, U, axis=0), np.repeat(weight / U, U)
    return drafts.astype(np.int32), weight, np.tile(uniforms, (D, 1))


def _emitted(drafts, weight, prefix, accepted, following, p):
    """The joint distribution [V**(gamma+1)] of the first tokens, a short window carried on by p."""
    gamma = drafts.shape[1]
    joint = np.zeros(V ** (gamma + 1))
    for n in range(gamma + 1):
        rows = accepted == n
        head = np.zeros((V**n, V))
        np.add.at(head, prefix[rows, n], weight[rows, None] * following[rows])
        head = head.ravel()
        for i in range(n + 1, gamma + 1):
            head = (head[:, None] * p[i]).ravel()
        joint += head
    return joint


def _true_joint(p):
    joint = np.ones(1)
    for table in p:
        joint = (joint[:, None] * table).ravel()
    return joint


def _distance(gamma, seed, kernel=_kernel, *, drafting="sample", given_q="real", valid=None):
    """Total variation between what is emitted and p; `given_q` is what the kernel is told."""
    p, q = _trees(gamma, seed)
    drafts, weight, uniforms = _outcomes(gamma, q, drafting=drafting)
    p_rows, q_rows, prefix = _windows(drafts, p, q)
    offered = np.full(len(drafts), gamma, np.int32) if valid is None else valid(drafts, q_rows)
    if given_q == "one-hot":
        q_rows = np.eye(V)[drafts]
    told = None if given_q == "none" else jnp.asarray(q_rows, jnp.float32)
    accepted, following = kernel(
        jnp.asarray(drafts), told, jnp.asarray(p_rows, jnp.float32), jnp.asarray(offered),
        jnp.asarray(uniforms),
    )  # fmt: skip
    got = _emitted(drafts, weight, prefix, np.array(accepted), np.array(following), p)
    assert abs(got.sum() - 1) < 1e-6
    return 0.5 * np.abs(got - _true_joint(p)).sum()


@pytest.mark.parametrize("gamma", [1, 2, 3, 4])
def test_every_outcome_summed_up_is_the_target_distribution(gamma):
    for seed in range(1 if gamma == 4 else 4):
        assert _distance(gamma, seed) < 1e-6


@pytest.mark.parametrize("kernel", [_swapped_ratio, _no_residual, _always])
def test_the_sum_finds_wrong_rules(kernel):
    assert _distance(2, 0, kernel) > 0.02


@pytest.mark.parametrize("given_q", ["none", "one-hot"])
def test_drafts_that_were_not_drawn_are_points_of_probability(given_q):
    for gamma in (1, 3):
        assert _distance(gamma, 1, drafting="argmax", given_q=given_q) < 1e-6


def test_the_sum_finds_the_soft_q_of_an_argmax_draft():
    assert _distance(2, 1, drafting="argmax", given_q="real") > 0.02


def test_drafting_may_stop_where_the_drafter_is_unsure():
    seen = set()

    def unsure(drafts, q):
        valid = np.array(offered_drafts(jnp.asarray(q.max(axis=-1), jnp.float32), 0.45))
        seen.update(valid.tolist())
        return valid

    for seed in range(4):
        assert _distance(3, seed, valid=unsure) < 1e-6
    assert len(seen) > 2


def test_a_draft_withdrawn_for_its_value_changes_the_distribution():
    half = jnp.full((2, 2, 2), 0.5)  # p = q = (.5, .5), and only token 0 is offered
    drafts, none = jnp.array([[0], [1]], jnp.int32), jnp.zeros((2, 1))
    offered = jnp.array([1, 0], jnp.int32)
    accepted, following = map(np.array, _kernel(drafts, half[:, :1], half, offered, none))
    np.testing.assert_array_equal(accepted, [1, 0])
    first_is_0 = np.where(accepted == 1, 1.0, following[:, 0])
    assert first_is_0.mean() == pytest.approx(0.75)  # not 0.5


# Rollouts: whole rounds with keys, in a chain where the next token depends on the last.
ROWS, VOCAB, LENGTH = 16_384, 4, 3
_rng = np.random.default_rng(7)
TARGET = jnp.asarray(_rng.dirichlet(np.full(VOCAB, 1.0), VOCAB), jnp.float32)
DRAFTER = jnp.asarray(_rng.dirichlet(np.full(VOCAB, 1.5), VOCAB), jnp.float32)


def _draft(last, lengths, stream, gamma, vocab):
    """The last token and the drafts that follow it [B, gamma+1]."""

    def step(token, i):
        keys = keys_at(stream, lengths + i)
        token = draw_tokens(jnp.log(DRAFTER)[token], keys, vocab=vocab)
        return token, token

    drafts = jax.lax.scan(step, last, jnp.arange(gamma, dtype=jnp.int32))[1]
    return jnp.concatenate([last[None], drafts]).T


def _rollout(keys, first, *, gamma, coupled=False, target=TARGET, length=LENGTH):
    """Tokens [B, length] and the number of drafts that were kept."""
    B = first.shape[0]

    def body(carry):
        written, lengths, last, reason, kept = carry
        stream = keys.resample if coupled else keys.draft
        context = _draft(last, lengths, stream, gamma, len(target))
        drafts, valid = context[:, 1:], jnp.full((B,), gamma, jnp.int32)
        p = target[context]
        if coupled:
            positions = lengths[:, None] + jnp.arange(gamma + 1, dtype=jnp.int32)[None]
            choices = draw_tokens(jnp.log(p), keys_at(keys.resample, positions))
            verdict = verify_choices(drafts, choices, valid)
        else:
            q = DRAFTER[context[:, :gamma]]
            verdict = verify_rejection(drafts, q, p, valid, keys, lengths)
        window = cut_window(drafts, verdict, room=length - lengths, reason=reason)
        written = append_tokens(written, lengths, window)
        kept = kept + jnp.sum(jnp.where(reason == StopReason.RUNNING, verdict.accepted, 0))
        return written, lengths + window.count, verdict.token, window.reason, kept

    start = (
        jnp.full((B, length), -1, jnp.int32),
        jnp.zeros((B,), jnp.int32),
        first,
        jnp.zeros((B,), jnp.int32),
        jnp.int32(0),
    )
    done = jax.lax.while_loop(lambda c: jnp.any(c[3] == StopReason.RUNNING), body, start)
    return done[0], done[4]


_row_keys = jax.jit(row_keys)
_rollout = jax.jit(_rollout, static_argnames=("gamma", "coupled", "length"))


def _chi_square(tokens):
    """Chi-square over its degrees of freedom for the joint of the rows' tokens."""
    target = np.array(TARGET, np.float64)
    joint = target[0][:, None, None] * target[:, :, None] * target[None]
    joint = joint.ravel() / joint.sum() * len(tokens)
    tokens = np.array(tokens)
    counts = np.bincount(tokens @ [VOCAB**2, VOCAB, 1], minlength=VOCAB**3)
    return ((counts - joint) ** 2 / joint).sum() / (len(joint) - 1)


@pytest.fixture(scope="module")
def keys():
    return _row_keys(jax.random.key(11), jnp.arange(ROWS))


@pytest.mark.parametrize("gamma", [1, 4])
def test_rollouts_follow_the_target(keys, gamma):
    first = jnp.zeros((ROWS,), jnp.int32)
    tokens, kept = _rollout(keys, first, gamma=gamma)
    assert kept > ROWS / 4
    # 63 degrees of freedom: 1.7 is a chance of about 0.0005, with keys that never change.
    assert _chi_square(tokens) < 1.7


@pytest.mark.parametrize(("used_for", "taken_from"), [
    ("resample", "accept"), ("draft", "resample"), ("accept", "draft"),
])  # fmt: skip
def test_rollouts_find_a_key_with_two_purposes(keys, used_for, taken_from):
    shared = keys._replace(**{used_for: getattr(keys, taken_from)})
    tokens, _ = _rollout(shared, jnp.zeros((ROWS,), jnp.int32), gamma=4)
    assert _chi_square(tokens) > 5


def test_a_row_does_not_depend_on_its_place_or_neighbours(keys):
    first = jnp.zeros((ROWS,), jnp.int32)
    tokens = np.array(_rollout(keys, first, gamma=4)[0])
    order = np.random.default_rng(0).permutation(ROWS)
    moved = type(keys)(*(stream[order] for stream in keys))
    np.testing.assert_array_equal(_rollout(moved, first, gamma=4)[0], tokens[order])
    others = first.at[::2].set(2)
    mixed = np.array(_rollout(keys, others, gamma=4)[0])
    np.testing.assert_array_equal(mixed[1::2], tokens[1::2])
    assert (mixed[::2] != tokens[::2]).any()


def test_coupled_drafting_emits_the_tokens_of_plain_decoding():
    B, length = 64, 12
    streams = _row_keys(jax.random.key(2), jnp.arange(B))
    first = jnp.arange(B, dtype=jnp.int32) % VOCAB
    # The target's vocabulary is padded: one token more, which the drafter lacks.
    wide = jnp.concatenate([TARGET * 0.9, jnp.full((VOCAB, 1), 0.1)], axis=1)
    wide = jnp.concatenate([wide, wide[:1]])
    options = dict(coupled=True, target=wide, length=length)
    plain, kept = _rollout(streams, first, gamma=0, **options)
    assert kept == 0
    assert (plain == VOCAB).any()
    tokens, kept = _rollout(streams, first, gamma=3, **options)
    np.testing.assert_array_equal(tokens, plain)
    assert kept > B


def test_a_drafter_equal_to_the_target_is_always_kept():
    drafts = np.random.default_rng(0).integers(0, VOCAB, (4096, 3))
    target = np.array(TARGET)
    p = np.concatenate([target[drafts], target[drafts[:, :1]]], axis=1)
    almost_one = np.nextafter(np.float32(1), np.float32(0))
    valid = np.full((4096,), 3, np.int32)
    uniforms = np.full(drafts.shape, almost_one)
    accepted, following = _kernel(drafts, p[:, :3], p, valid, uniforms)
    np.testing.assert_array_equal(accepted, valid)
    np.testing.assert_array_equal(following, p[:, 3])
    # The least difference is noticed.
    q = np.nextafter(p[:, :3], np.float32(2)) + np.float32(1e-6)
    assert (np.array(_kernel(drafts, q, p, valid, uniforms)[0]) < 3).all()
