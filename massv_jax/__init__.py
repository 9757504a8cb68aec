"""MASSV (arXiv 2505.10526): multimodal drafters for speculative decoding."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from massv_jax.drafter import Drafter
    from massv_jax.drafter_config import DrafterConfig
    from massv_jax.loading import load_drafter, make_drafter

# name -> module; imported when first used, so that commands which need none start fast.
_EXPORTS = {
    "Drafter": "drafter",
    "DrafterConfig": "drafter_config",
    "load_drafter": "loading",
    "make_drafter": "loading",
}

__all__ = ["Drafter", "DrafterConfig", "load_drafter", "make_drafter"]


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"massv_jax.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
