"""The key-value cache: a value that goes in and comes out, never an attribute.

Slots are places in the cache; positions are what the rotary embeddings see. They differ where a
row is padded. For prompts `abc` and `__d` (left-padded) and two tokens generated:

    slot      0 1 2 3 4
    row 0     a b c e f    valid 11111    positions 0 1 2 3 4
    row 1     _ _ d g h    valid 00111    positions - - 0 1 2

Right-padded prompts work in the same way (`d__gh`, valid 10011): a hole is never seen, and
positions count valid slots only.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from core_jax.ops.attention import cache_mask


@flax.struct.dataclass
class KVCache:
    """Keys and values of every layer.

    Attributes:
      k: [L, B, S, K, H] keys, rotated.
      v: [L, B, S, K, H] values.
      valid: bool [B, S], slots that hold a real token. Slots from `end` on are False.
      end: the next slot to write: an int32 scalar while all rows share it (a cheap slice
        update), or int32 [B] where rows advance on their own.
    """

    k: jax.Array
    v: jax.Array
    valid: jax.Array
    end: jax.Array

    @classmethod
    def allocate(
        cls, *, layers: int, batch: int, slots: int, kv_heads: int, head_dim: int, dtype: Any
    ) -> "KVCache":
        """An empty cache of S = `slots`."""
        shape = (layers, batch, slots, kv_heads, head_dim)
        return cls(
            k=jnp.zeros(shape, dtype),
            v=jnp.zeros(shape, dtype),
            valid=jnp.zeros((batch, slots), bool),
            end=jnp.zeros((), jnp.int32),
        )

    @property
    def slots(self) -> int:
        """S."""
        return self.k.shape[2]

    def lengths(self) -> Int[Array, " B"]:
        """Valid tokens of each row: the position of the next one."""
        return jnp.sum(self.valid, axis=1, dtype=jnp.int32)

    def claim(
        self, new: Bool[Array, "B T"]
    ) -> tuple["KVCache", Int[Array, "B T"], Bool[Array, "B T S"]]:
        """Announces T inputs, which the model then writes at `end`.

        Args:
          new: which of the inputs are real tokens. There must be room for all T: a write past
            the last slot would be moved back onto earlier ones.

        Returns:
          The cache with `valid` set for the new slots (`end` moves when they are written), the
          inputs' positions, and which slots each input sees.
        """
        B, T = new.shape
        steps = jnp.cumsum(new, axis=1, dtype=jnp.int32) - 1
        positions = jnp.maximum(self.lengths()[:, None] + steps, 0)
        if self.end.ndim:
            valid = jax.vmap(lambda row, x, at: jax.lax.dynamic_update_slice(row, x, (at,)))(
                self.valid, new, self.end
            )
            slots = self.end[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
        else:
            valid = jax.lax.dynamic_update_slice(self.valid, new, (0, self.end))
            slots = jnp.broadcast_to(self.end + jnp.arange(T, dtype=jnp.int32)[None], (B, T))
        return dataclasses.replace(self, valid=valid), positions, cache_mask(slots, valid)

    def ends(self) -> Int[Array, " B"]:
        """The next slot of each row."""
        return jnp.broadcast_to(self.end, self.valid.shape[:1]).astype(jnp.int32)

    def per_row(self) -> "KVCache":
        """The same cache with an `end` for each row; a single row keeps its cheap scalar."""
        return self if self.valid.shape[0] == 1 else dataclasses.replace(self, end=self.ends())

    def rewind(self, end: Int[Array, "*B"]) -> "KVCache":
        """Forgets every slot from `end` on; a scalar, or one for each row.

        Keys and values stay as they are: an unseen slot is overwritten before it is seen.
        """
        end = jnp.asarray(end, jnp.int32)
        end = end.reshape(()) if end.shape == (1,) else end  # see `per_row`
        slots = jnp.arange(self.slots, dtype=jnp.int32)[None]
        valid = self.valid & (slots < end.reshape(-1, 1))
        return dataclasses.replace(self, valid=valid, end=end)

    def grow(self, extra: int) -> "KVCache":
        """The same cache with more free slots (a copy)."""
        room = ((0, 0), (0, 0), (0, extra), (0, 0), (0, 0))
        return dataclasses.replace(
            self,
            k=jnp.pad(self.k, room),
            v=jnp.pad(self.v, room),
            valid=jnp.pad(self.valid, ((0, 0), (0, extra))),
        )

    def repeat(self, times: int) -> "KVCache":
        """Every row `times` times in succession: B -> B * times."""
        return KVCache(
            k=jnp.repeat(self.k, times, axis=1),
            v=jnp.repeat(self.v, times, axis=1),
            valid=jnp.repeat(self.valid, times, axis=0),
            end=jnp.repeat(self.end, times, axis=0) if self.end.ndim else self.end,
        )

    def take_rows(self, rows: Int[Array, " R"], *, shared: int = 0) -> "KVCache":
        """Row i becomes the old row `rows[i]`.

        Args:
          rows: as many as the cache has.
          shared: the first slots hold the same in row i and row `rows[i]`, as the prefix of the
            beams of one prompt does, and are left in place.
        """

        def take(stack):
            tail = jax.lax.slice_in_dim(stack, shared, None, axis=2)
            tail = jnp.take(tail, rows, axis=1, mode="clip")
            return jax.lax.dynamic_update_slice_in_dim(stack, tail, shared, axis=2)

        return KVCache(
            k=take(self.k),
            v=take(self.v),
            valid=jnp.take(self.valid, rows, axis=0, mode="clip"),
            end=jnp.take(self.end, rows, mode="clip") if self.end.ndim else self.end,
        )


def write_layer(
    stack: Float[Array, "L B S K H"],
    new: Float[Array, "B T K H"],
    layer: Int[Array, ""],
    end: Int[Array, "*B"],
) -> Float[Array, "L B S K H"]:
    """Writes T slots of one layer from `end` on (a scalar, or one for each row)."""
    new = new.astype(stack.dtype)
    if not end.ndim:
        return jax.lax.dynamic_update_slice(stack, new[None], (layer, 0, end, 0, 0))
    B, T = new.shape[:2]
    slots = end[:, None] + jnp.arange(T, dtype=end.dtype)[None]
    return stack.at[layer, jnp.arange(B)[:, None], slots].set(new, mode="drop")


def read_layer(stack: Float[Array, "L B S K H"], layer: Int[Array, ""]) -> Float[Array, "B S K H"]:
    """One layer's keys or values."""
    return jax.lax.dynamic_index_in_dim(stack, layer, axis=0, keepdims=False)
