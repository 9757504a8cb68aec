"""The one place that scans and rematerialises layers."""

from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from core_jax.ops.execution import Execution, RematPolicy
from core_jax.ops.splash import SAVED_NAME

_POLICIES = {
    "full": None,  # jax.checkpoint's default keeps nothing
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(SAVED_NAME),
}


def remat_layer(block: type[nn.Module], policy: RematPolicy) -> type[nn.Module]:
    """The block class, recomputed in the backward pass as `policy` says (Execution.remat)."""
    if policy == "none":
        return block
    return nn.remat(block, prevent_cse=True, policy=_POLICIES[policy])


def scan_layers(
    block: type[nn.Module], *, length: int, execution: Execution, num_broadcast: int = 0
) -> type[nn.Module]:
    """A module class that applies `block` `length` times with stacked parameters.

    The block is called as `block(x, per_layer, *broadcast) -> (x, per_layer_out)`; `per_layer` is
    a pytree with a leading layer axis (None where there is nothing, such as without a cache).

    Args:
      block: Linen module class.
      length: number of layers; the parameters get a leading axis of this length.
      execution: its `remat` and `unroll`.
      num_broadcast: how many arguments after `per_layer` every layer shares.
    """
    if execution.remat != "none":
        # Inside a scan the compiler cannot merge the two passes, so no barrier is needed.
        block = nn.remat(block, prevent_cse=False, policy=_POLICIES[execution.remat])
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=cast(Any, (0, *(nn.broadcast,) * num_broadcast)),  # annotated as one int only
        out_axes=0,
        length=length,
        unroll=min(execution.unroll, length),
    )


def scan_pattern(
    first: Callable[[Any, Any, Any], Any],
    second: Callable[[Any, Any, Any], Any],
    carry: Any,
    stacks: tuple[Any, Any],
    *,
    counts: tuple[int, int],
    every: int,
    in_place: bool,
) -> Any:
    """Applies layers of two kinds: `every` - 1 of the first, one of the second, and so on.

    A rest of the first kind ends the sequence. Two nested scans and one for the rest, whatever
    the number of layers.

    Args:
      first: (parameters of a layer, carry, its number among its kind) -> carry.
      second: the same for the other kind.
      carry: what goes through the layers.
      stacks: stacked parameters of either kind (anything for a kind without layers).
      counts: how many layers of either kind.
      every: length of the pattern.
      in_place: each layer takes its parameters from the whole stack. Scans over slices of the
        stack copy the parameters of a pattern, then those of a layer, which at a token a step
        takes several times as long; but only they have gradients at a fair price.
    """

    def layers(apply, stack, carry, numbers):
        def one(carry, layer):
            number, params = layer
            if in_place:
                params = jax.tree.map(
                    lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False), stack
                )
            return apply(params, carry, number), None

        return jax.lax.scan(one, carry, (numbers, None if in_place else stack))[0]

    def part(stack, start, stop, *shape):
        if in_place:
            return stack
        return jax.tree.map(lambda x: x[start:stop].reshape(*shape, *x.shape[1:]), stack)

    a, b = stacks
    patterns, inner = counts[1], every - 1
    rest = patterns * inner
    if patterns:

        def pattern(carry, xs):
            (number_a, number_b), (slice_a, slice_b) = xs
            if inner:
                carry = layers(first, a if in_place else slice_a, carry, number_a)
            return layers(second, b if in_place else slice_b, carry, number_b), None

        numbers = (jnp.arange(rest).reshape(patterns, inner), jnp.arange(patterns)[:, None])
        slices = (None, None)
        if not in_place:
            slices = (part(a, 0, rest, patterns, inner) if inner else None,
                      part(b, 0, patterns, patterns, 1))  # fmt: skip
        carry = jax.lax.scan(pattern, carry, (numbers, slices))[0]
    if counts[0] > rest:
        tail = part(a, rest, counts[0], counts[0] - rest)
        carry = layers(first, tail, carry, jnp.arange(rest, counts[0]))
    return carry
