"""Speculative decoding: random keys, the accept rules, where a window is cut.

Plain functions of arrays; what runs networks stands on them.
"""

from massv_jax.speculative.accept import (
    StopReason,
    Verdict,
    Window,
    append_tokens,
    cut_window,
    draw_tokens,
    offered_drafts,
    verify_choices,
    verify_rejection,
    warp_window,
)
from massv_jax.speculative.keys import Purpose, RowKeys, keys_at, purpose_key, row_keys

__all__ = [
    "Purpose",
    "RowKeys",
    "StopReason",
    "Verdict",
    "Window",
    "append_tokens",
    "cut_window",
    "draw_tokens",
    "keys_at",
    "offered_drafts",
    "purpose_key",
    "row_keys",
    "verify_choices",
    "verify_rejection",
    "warp_window",
]
