"""What the model FLOP utilisation (MFU) is made of: peak rates, and the compiler's count."""

from typing import Any

import jax

# Dense bf16 FLOP/s of one JAX device, from the vendors' data sheets, without sparsity. The key
# is a part of `device_kind` in lower case; the first that matches counts, so longer names come
# first. A v2 or v3 device is one core, half a chip; v4 and later are whole chips.
PEAK_BF16_FLOPS: tuple[tuple[str, float], ...] = (
    ("tpu v2", 22.5e12),
    ("tpu v3", 61.5e12),
    ("tpu v4", 275e12),
    ("tpu v5 lite", 197e12),
    ("tpu v5e", 197e12),
    ("tpu v5p", 459e12),
    ("tpu v5", 459e12),
    ("tpu v6", 918e12),
    ("gb200", 2.5e15),
    ("b200", 2.25e15),
    ("h200", 989e12),
    ("h100 pcie", 756e12),
    ("h100 nvl", 835e12),
    ("h100", 989e12),
    ("a100", 312e12),
    ("a10g", 70e12),
    ("l40s", 362e12),
    ("l4", 121e12),
    ("v100", 125e12),
    ("t4", 65e12),
)


def peak_flops(device: Any = None) -> float | None:
    """Peak dense bf16 FLOP/s of a device (the first one by default), or None if unknown.

    CPUs are unknown: their peak depends on clocks and on who else is using them.
    """
    device = jax.devices()[0] if device is None else device
    kind = device.device_kind.lower()
    return next((flops for name, flops in PEAK_BF16_FLOPS if name in kind), None)


def compiler_flops(compiled: Any) -> float | None:
    """The compiler's count for one device; None where the backend has none."""
    try:
        analysis = compiled.cost_analysis()
    except Exception:  # some backends have no cost analysis, each in its own way
        return None
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    flops = (analysis or {}).get("flops", 0.0)
    return flops if flops > 0 else None
