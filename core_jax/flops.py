"""Arithmetic of a function, counted on its trace: products only, layers of a scan included.

The compiler's own count sees the body of a scan once, so it is a lower bound for networks whose
layers are scanned. Here every equation is visited and a scan's body counts as often as it runs.
Matrix products and convolutions count two operations a multiply-add; nothing else counts, as is
usual for the model FLOP utilisation (arXiv 2204.02311, appendix B). Trace without
rematerialisation: recomputing is not useful work.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax


def count_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """Operations of one call; nothing is computed.

    Args:
      function: pure; may be jitted, differentiated, scanned. The body of a `while_loop` counts
        once and of a `cond` the dearest branch counts; of a Pallas kernel every block counts,
        also one that its mask skips.
      arguments: arrays or their shapes.
    """
    return count_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def count_jaxpr(jaxpr: Any) -> float:
    """Operations of a trace; see `count_flops`."""
    total = 0.0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            total += _dot_general(equation)
        elif name == "conv_general_dilated":
            total += _convolution(equation)
        else:
            inner = [count_jaxpr(x) for x in _inner(equation.params)]
            if name == "cond":
                total += max(inner, default=0.0)
            else:
                total += sum(inner) * _repetitions(equation)
    return total


def _repetitions(equation: Any) -> int:
    """How often what an equation holds is computed, over all devices."""
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        return params["length"]
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    if name == "shard_map":  # what lies whole on the devices of an axis is not more work
        specs = (*params["in_specs"], *params["out_specs"])
        axes = {a for spec in specs for part in spec for a in _names(part)}
        return math.prod(params["mesh"].shape[axis] for axis in axes)
    return 1


def _names(part: Any) -> tuple[str, ...]:
    """Mesh axes that split one dimension."""
    return part if isinstance(part, tuple) else () if part is None else (part,)


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """The traces that an equation holds (of jit, scan, custom derivatives, remat, cond)."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            item = getattr(item, "jaxpr", item)  # a closed one holds the bare one
            if hasattr(item, "eqns"):
                yield item


def _dot_general(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[d] for d in contracted)


def _convolution(equation: Any) -> float:
    params = equation.params
    kernel = equation.invars[1].aval.shape
    out_features = kernel[params["dimension_numbers"].rhs_spec[0]]
    per_output = math.prod(kernel) / out_features
    # A dilated input is mostly zeros that nobody has to multiply (gradients of strides).
    zeros = math.prod(params["lhs_dilation"])
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * per_output / zeros
