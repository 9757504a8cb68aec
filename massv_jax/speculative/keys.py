"""Random keys that depend on (row seed, position, purpose) and on nothing else.

    key of a run -- purpose --> purpose_key -- row seed --> RowKeys -- position --> keys_at

A position is a token's place in its row's answer: 0 is the first new token. It counts neither the
prompt nor padding, so it is the same for the target and for a drafter that sees another prompt.
A row's draws therefore do not depend on its place in the batch, on its neighbours or on how many
rounds they took.

- DRAFT: the drafter's own draw. A position may be drafted in several rounds, with the same key:
  the drafts thrown away before never had a part in what was emitted.
- ACCEPT: the uniform number against which a draft is judged. It is used for an emitted token at
  most once, for the same reason.
- RESAMPLE: the token that the target itself chooses at a position: after a rejection, after a
  window that was accepted whole, and everywhere in plain decoding. Every token that it draws is
  emitted, unless the row has ended.

Plain sampling is thus the RESAMPLE key at every position. `core_jax.decode.generate` with
`key=purpose_key(key, Purpose.RESAMPLE)` and the same `row_seeds` draws with the same keys. Coupled
drafting lets the drafter, too, draw with the RESAMPLE keys; drafting for the rejection rule must
not.
"""

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


class Purpose(enum.IntEnum):
    """What a random number is for."""

    DRAFT = 1
    ACCEPT = 2
    RESAMPLE = 3


class RowKeys(NamedTuple):
    """A stream for each purpose and row, from which `keys_at` takes the key of a position.

    Attributes:
      draft: Key [B].
      accept: Key [B].
      resample: Key [B].
    """

    draft: jax.Array
    accept: jax.Array
    resample: jax.Array


def purpose_key(key: Key[Array, ""], purpose: Purpose) -> Key[Array, ""]:
    """The key from which the streams of one purpose come."""
    return jax.random.fold_in(key, int(purpose))


def row_keys(key: Key[Array, ""], row_seeds: Int[Array, " B"]) -> RowKeys:
    """The streams of every row.

    Args:
      key: of the run.
      row_seeds: a number for each row, of which the lower 32 bits count. Rows with the same seed
        and the same prompt get the same answer.
    """

    def stream(purpose: Purpose) -> Key[Array, " B"]:
        base = purpose_key(key, purpose)
        return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(base, row_seeds)

    return RowKeys(stream(Purpose.DRAFT), stream(Purpose.ACCEPT), stream(Purpose.RESAMPLE))


def keys_at(stream: Key[Array, " B"], positions: Int[Array, "B *T"]) -> Key[Array, "B *T"]:
    """The keys of positions.

    Args:
      stream: of one purpose, from `row_keys`.
      positions: int32 [B], or [B, T] for several positions of each row.
    """
    fold = jax.random.fold_in
    if positions.ndim == 2:
        fold = jax.vmap(fold, in_axes=(None, 0))
    return jax.vmap(fold)(stream, positions)


def uniforms_at(stream: Key[Array, " B"], positions: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Float32 numbers in [0, 1), one for each position."""
    draw = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, dtype=jnp.float32)))
    return draw(keys_at(stream, positions))
