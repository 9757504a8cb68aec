"""The key-value cache of networks whose layers are local or global (Gemma 3).

A global layer sees everything before it; a local layer sees the last W tokens and holds no more
than W + draft + 1 of them, in a ring. Unlike in `KVCache` a token lies where its position says
and padding is not stored, so every row has a length of its own and nothing else:

    position      0 1 2 3 4 5 6        global slots   a b c d e f g
    row           a b c d e f g        ring of 4      e f g d       (position % 4)

Going back (speculative decoding) is a smaller length. What was written past it stays in the ring
in the place of tokens that are `ring` positions older; those lie outside the window of whatever
comes next as long as no more than draft + 2 tokens are taken back, which is what the extra slots
are for.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from core_jax.decode.cache import read_layer
from core_jax.ops.attention import causal_mask


@flax.struct.dataclass
class LayerView:
    """What the T inputs of a call see in the layers of one kind.

    Attributes:
      slots: int32 [B, T], where each input is written; one past the last slot is nowhere. None
        without a cache.
      cached: bool [B, T, S], the slots that an input sees; None if no slot is read.
      own: bool [B, T, T], the inputs that an input sees; None if it finds them in their slots.
        With both, slots are read before the inputs are written.
    """

    slots: jax.Array | None
    cached: jax.Array | None
    own: jax.Array | None


@flax.struct.dataclass
class View:
    """What the inputs of a call see.

    Attributes:
      local: in local layers.
      full: in global layers.
      end: int32 [B], the rows' lengths after the call; None without a cache.
    """

    local: LayerView
    full: LayerView
    end: jax.Array | None


@flax.struct.dataclass
class LocalGlobalCache:
    """Keys and values of every layer; see the module.

    Attributes:
      local_k, local_v: [L, B, R, K, H], the local layers' rings.
      full_k, full_v: [L, B, S, K, H], the global layers.
      end: int32 [B], tokens of each row: the position of the next one.
      window: W, tokens that a local layer sees, the query's own included.
      draft: how many tokens a draft has; see `rewind`.
      fresh: nothing was written yet, so that a prompt need not look at the slots. A part of the
        type, as it were: it is False after the first call.
    """

    local_k: jax.Array
    local_v: jax.Array
    full_k: jax.Array
    full_v: jax.Array
    end: jax.Array
    window: int = flax.struct.field(pytree_node=False)
    draft: int = flax.struct.field(pytree_node=False, default=0)
    fresh: bool = flax.struct.field(pytree_node=False, default=False)

    @classmethod
    def allocate(
        cls, *, local_layers: int, full_layers: int, batch: int, slots: int, kv_heads: int,
        head_dim: int, window: int, draft: int = 0, dtype: Any,
    ) -> "LocalGlobalCache":  # fmt: skip
        """An empty cache for rows of up to `slots` tokens."""
        ring = min(window + draft + 1, slots)
        local = (local_layers, batch, ring, kv_heads, head_dim)
        full = (full_layers, batch, slots, kv_heads, head_dim)
        return cls(
            local_k=jnp.zeros(local, dtype),
            local_v=jnp.zeros(local, dtype),
            full_k=jnp.zeros(full, dtype),
            full_v=jnp.zeros(full, dtype),
            end=jnp.zeros((batch,), jnp.int32),
            window=window,
            draft=draft,
            fresh=True,
        )

    @property
    def slots(self) -> int:
        """S, the longest row."""
        return self.full_k.shape[2]

    @property
    def ring(self) -> int:
        """R, slots of a local layer."""
        return self.local_k.shape[2]

    def lengths(self) -> Int[Array, " B"]:
        """Tokens of each row: the position of the next one."""
        return self.end

    def claim(
        self, new: Bool[Array, "B T"], blocks: Int[Array, "B T"] | None = None
    ) -> tuple["LocalGlobalCache", Int[Array, "B T"], View]:
        """Announces T inputs, which the model then writes.

        Args:
          new: which of the inputs are real tokens; the others are not stored.
          blocks: the image that an input belongs to, -1 for text. Inputs of one image see one
            another in both directions, so an image is given within one call.

        Returns:
          The cache (rows grow when the inputs are written; what does not fit into `slots` is not
          stored), the inputs' positions, and what they see.
        """
        positions = self.end[:, None] + jnp.cumsum(new, axis=1, dtype=jnp.int32) - 1
        positions = jnp.maximum(positions, 0)
        after = self.end + jnp.sum(new, axis=1, dtype=jnp.int32)
        fits = new & (positions < self.slots)
        # Of a prompt longer than the ring only the end is kept.
        last = fits & (positions >= jnp.minimum(after, self.slots)[:, None] - self.ring)
        full_slots = jnp.where(fits, positions, self.slots)
        local_slots = jnp.where(last, positions % self.ring, self.ring)
        # Inputs may be written before they are read if that hides nothing that they should see.
        T, W = new.shape[1], self.window
        apart = self.fresh or blocks is not None
        at_once = self.ring - W + 1 if self.ring < self.slots else T
        local_apart = apart or at_once < T
        own = sequence_view(new, positions, window=W, blocks=blocks)
        local_cached = full_cached = None
        if not self.fresh:
            held = self._ring_positions(self.end if local_apart else after)
            local_cached = _sees(positions, held, window=W)
            slots = jnp.arange(self.slots, dtype=jnp.int32)[None]
            length = self.end if apart else after
            held = jnp.where(slots < length[:, None], slots, -1)
            full_cached = _sees(positions, held)
        view = View(
            local=LayerView(local_slots, local_cached, own.local.own if local_apart else None),
            full=LayerView(full_slots, full_cached, own.full.own if apart else None),
            end=after,
        )
        return self, positions, view

    def _ring_positions(self, length: Int[Array, " B"]) -> Int[Array, "B R"]:
        """The position in each slot of the rings of rows of these lengths; negative if empty."""
        last = jnp.minimum(length, self.slots)[:, None] - 1
        slots = jnp.arange(self.ring, dtype=jnp.int32)[None]
        return last - jnp.mod(last - slots, self.ring)

    def written(self, local: Any, full: Any, end: Int[Array, " B"]) -> "LocalGlobalCache":
        """The cache after a call: (keys, values) of either kind, and the rows' lengths."""
        return dataclasses.replace(
            self, local_k=local[0], local_v=local[1], full_k=full[0], full_v=full[1], end=end,
            fresh=False,
        )  # fmt: skip

    def ends(self) -> Int[Array, " B"]:
        """The same: tokens lie where their positions say."""
        return self.end

    def per_row(self) -> "LocalGlobalCache":
        """The cache itself: its rows have lengths of their own."""
        return self

    def rewind(self, end: Int[Array, "*B"]) -> "LocalGlobalCache":
        """Forgets every token from `end` on; a scalar, or one for each row.

        Going back further than `draft` + 2 tokens loses tokens that local layers should see.
        """
        end = jnp.broadcast_to(jnp.asarray(end, jnp.int32), self.end.shape)
        return dataclasses.replace(self, end=jnp.minimum(self.end, end))

    def grow(self, extra: int) -> "LocalGlobalCache":
        """The same cache with room for more tokens (a copy)."""
        # A ring that is to grow holds whole rows still: nothing in it has wrapped around.
        ring = min(self.window + self.draft + 1, self.slots + extra) - self.ring

        def pad(stack, more):
            return jnp.pad(stack, ((0, 0), (0, 0), (0, more), (0, 0), (0, 0)))

        return dataclasses.replace(
            self, local_k=pad(self.local_k, ring), local_v=pad(self.local_v, ring),
            full_k=pad(self.full_k, extra), full_v=pad(self.full_v, extra),
        )  # fmt: skip

    def repeat(self, times: int) -> "LocalGlobalCache":
        """Every row `times` times in succession: B -> B * times."""
        return self._map_rows(lambda x, axis: jnp.repeat(x, times, axis=axis))

    def take_rows(self, rows: Int[Array, " R"], *, shared: int = 0) -> "LocalGlobalCache":
        """Row i becomes the old row `rows[i]`.

        Args:
          rows: as many as the cache has.
          shared: not used: a padded prompt takes fewer slots than it has inputs.
        """
        del shared
        return self._map_rows(lambda x, axis: jnp.take(x, rows, axis=axis, mode="clip"))

    def _map_rows(self, function: Any) -> "LocalGlobalCache":
        stacks = {
            name: function(getattr(self, name), 1)
            for name in ("local_k", "local_v", "full_k", "full_v")
        }
        return dataclasses.replace(self, **stacks, end=function(self.end, 0))


def sequence_view(
    valid: Bool[Array, "B T"],
    positions: Int[Array, "B T"],
    *,
    window: int,
    blocks: Int[Array, "B T"] | None = None,
) -> View:
    """What the inputs of a whole sequence see of one another.

    A local layer sees the last `window` tokens and, within an image, all that follow
    (transformers' order: the window cuts off what lies too far back even there).

    For T = 4, window 2 and an image `bb` in `abbd`, rows are queries:

        global 1000 / 1110 / 1110 / 1111        local 1000 / 1110 / 0110 / 0011

    Args:
      valid: False at padding, which nothing sees.
      positions: of the inputs; distances are counted in valid tokens.
      window: W.
      blocks: the image that an input belongs to, -1 for text.
    """
    full = causal_mask(valid.shape[1])
    if blocks is not None:
        same = blocks[:, :, None] == blocks[:, None, :]
        full = full | (same & (blocks >= 0)[:, :, None])
    full = full & valid[:, None, :]
    local = full & (positions[:, None, :] > positions[:, :, None] - window)
    return View(LayerView(None, None, local), LayerView(None, None, full), None)


def _sees(
    positions: Int[Array, "B T"], held: Int[Array, "B S"], *, window: int | None = None
) -> Bool[Array, "B T S"]:
    """Which of the held positions (negative: none) the inputs see."""
    query, key = positions[:, :, None], held[:, None, :]
    seen = (key >= 0) & (key <= query)
    return seen if window is None else seen & (key > query - window)


def update_and_gather(
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    view: LayerView,
    cached: tuple[Any, Any, Any] | None,
) -> tuple[Any, Any, Any, tuple[Any, Any] | None]:
    """Writes a layer's inputs into the cache, and collects what they see.

    Args:
      k: keys of the inputs, rotated.
      v: their values.
      view: of this kind of layer.
      cached: (stacked keys, stacked values, layer); None without a cache.

    Returns:
      Keys, values, mask, and the stacks after the call (None without a cache).
    """
    if cached is None:
        return k, v, view.own, None
    *stacks, layer = cached
    before = [read_layer(stack, layer) for stack in stacks] if view.own is not None else []
    assert view.slots is not None
    stacks = [
        _write_slots(stack, x, layer, view.slots) for stack, x in zip(stacks, (k, v), strict=True)
    ]
    if view.own is None:
        keys, values = (read_layer(stack, layer) for stack in stacks)
        return keys, values, view.cached, tuple(stacks)
    if view.cached is None:
        return k, v, view.own, tuple(stacks)
    keys, values = (
        jnp.concatenate([old.astype(x.dtype), x], axis=1)
        for old, x in zip(before, (k, v), strict=True)
    )
    return keys, values, jnp.concatenate([view.cached, view.own], axis=-1), tuple(stacks)


def _write_slots(stack, new, layer, slots):
    rows = jnp.arange(new.shape[0], dtype=slots.dtype)[:, None]
    return stack.at[layer, rows, slots].set(new.astype(stack.dtype), mode="drop")
