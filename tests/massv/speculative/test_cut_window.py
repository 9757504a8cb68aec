"""Where a window is cut: end tokens, room, rows that had stopped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from massv_jax.speculative import StopReason, Verdict, Window, append_tokens, cut_window

EOS, OTHER_EOS, PAD = 9, 8, 0
RUNNING, END, LENGTH = StopReason.RUNNING, StopReason.END_TOKEN, StopReason.LENGTH

CASES = [  # drafts, accepted, token, room, reason -> tokens, reason
    ([1, 2, 3], 0, 5, 9, RUNNING, [5], RUNNING),
    ([1, 2, 3], 2, 5, 9, RUNNING, [1, 2, 5], RUNNING),
    ([1, 2, 3], 3, 5, 9, RUNNING, [1, 2, 3, 5], RUNNING),
    ([1, EOS, 3], 3, 5, 9, RUNNING, [1, EOS], END),
    ([OTHER_EOS, EOS, 3], 3, 5, 9, RUNNING, [OTHER_EOS], END),
    ([1, EOS, 3], 1, 5, 9, RUNNING, [1, 5], RUNNING),  # the end token was refused
    ([1, EOS, 3], 0, EOS, 9, RUNNING, [EOS], END),
    ([1, 2, 3], 3, EOS, 9, RUNNING, [1, 2, 3, EOS], END),
    ([1, 2, 3], 3, 5, 4, RUNNING, [1, 2, 3, 5], LENGTH),
    ([1, 2, 3], 3, 5, 2, RUNNING, [1, 2], LENGTH),
    ([1, EOS, 3], 3, 5, 2, RUNNING, [1, EOS], END),  # in the last place
    ([1, 2, EOS], 3, 5, 2, RUNNING, [1, 2], LENGTH),  # beyond the last place
    ([1, 2, 3], 3, 5, 0, RUNNING, [], LENGTH),
    ([1, 2, 3], 3, 5, 9, END, [], END),
    ([EOS, 2, 3], 3, 5, 9, LENGTH, [], LENGTH),
]


@jax.jit
def _cut(drafts, accepted, token, room, reason):
    verdict = Verdict(accepted, token)
    return cut_window(
        drafts, verdict, room=room, reason=reason, eos_ids=(EOS, OTHER_EOS), pad_id=PAD
    )


@pytest.fixture(scope="module")
def windows():
    columns = [np.array([c[i] for c in CASES], np.int32) for i in range(5)]
    return _cut(*columns)


@pytest.mark.parametrize("row", range(len(CASES)))
def test_a_window_is_cut(windows, row):
    tokens, reason = CASES[row][5:]
    assert windows.count[row] == len(tokens)
    assert np.array(windows.tokens[row]).tolist() == tokens + [PAD] * (4 - len(tokens))
    assert windows.reason[row] == reason


def test_tokens_are_appended_and_never_moved():
    window = Window(
        tokens=jnp.array([[1, 2, 3], [4, 0, 0], [0, 0, 0], [5, 6, 7]], jnp.int32),
        count=jnp.array([3, 1, 0, 3], jnp.int32),
        reason=jnp.zeros((4,), jnp.int32),
    )
    written = jnp.full((4, 5), -1, jnp.int32)
    got = jax.jit(append_tokens)(written, jnp.array([0, 4, 2, 3], jnp.int32), window)
    want = [[1, 2, 3, -1, -1], [-1, -1, -1, -1, 4], [-1] * 5, [-1, -1, -1, 5, 6]]
    np.testing.assert_array_equal(got, want)
