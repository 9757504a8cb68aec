"""The one place that scans and rematerialises layers."""

from typing import Any, cast

import flax.linen as nn
import jax

from core_jax.ops.execution import RematPolicy

_POLICIES = {
    "full": None,  # jax.checkpoint's default keeps nothing
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def remat_layer(block: type[nn.Module], policy: RematPolicy) -> type[nn.Module]:
    """The block class, recomputed in the backward pass as `policy` says (Execution.remat)."""
    if policy == "none":
        return block
    return nn.remat(block, prevent_cse=True, policy=_POLICIES[policy])


def scan_layers(
    block: type[nn.Module], *, length: int, num_broadcast: int = 0, remat: RematPolicy = "none"
) -> type[nn.Module]:
    """A module class that applies `block` `length` times with stacked parameters.

    The block is called as `block(x, per_layer, *broadcast) -> (x, per_layer_out)`; `per_layer` is
    a pytree with a leading layer axis (None where there is nothing, such as without a cache).

    Args:
      block: Linen module class.
      length: number of layers; the parameters get a leading axis of this length.
      num_broadcast: how many arguments after `per_layer` every layer shares.
      remat: see `Execution.remat`.
    """
    if remat != "none":
        # Inside a scan the compiler cannot merge the two passes, so no barrier is needed.
        block = nn.remat(block, prevent_cse=False, policy=_POLICIES[remat])
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=cast(Any, (0, *(nn.broadcast,) * num_broadcast)),  # annotated as one int only
        out_axes=0,
        length=length,
    )
