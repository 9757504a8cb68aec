"""Numbers as people read them."""

from collections.abc import Sequence
from typing import Any

# Below this a number is nothing but the rounding of zero or a guard against dividing by it.
_NOTHING, _TINY, _HUGE = 1e-7, 1e-4, 1e7


def number_text(value: Any) -> str:
    """Returns a number with three significant digits, an int whole.

    Below 1e-4 it is scientific ("3.20e-5"), below 1e-7 "<0.0001" (its negative ">-0.0001"); None,
    which stands for what is not finite, says so. Other values are returned as text.
    """
    if value is None:
        return "not finite"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    size = abs(value)
    if size == 0:
        return "0"
    if size < _NOTHING:
        return "<0.0001" if value > 0 else ">-0.0001"
    if size < _TINY or size >= _HUGE:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    if size >= 999.5:
        return f"{value:,.0f}"
    return f"{value:#.3g}".removesuffix(".")


def interval_text(ends: Sequence[float | None] | None, level: float | None = None) -> str:
    """Returns "[low, high]", with the level where it is not 95 %; "" for none."""
    if ends is None:
        return ""
    low, high = (number_text(end) for end in ends)
    return f"[{low}, {high}]" + ("" if level in (None, 0.95) else f" ({level:.0%})")


def setting_text(value: Any) -> str:
    """Returns a setting's value: yes and no for truth values, lists without brackets."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(setting_text(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {setting_text(item)}" for name, item in value.items())
    return "none" if value is None else number_text(value)
