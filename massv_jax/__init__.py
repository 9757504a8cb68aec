"""MASSV (arXiv 2505.10526): multimodal drafters for speculative decoding."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from massv_jax.drafter import Drafter
    from massv_jax.drafter_config import DrafterConfig
    from massv_jax.loading import load_drafter, make_drafter
    from massv_jax.pixels import limit_pixels
    from massv_jax.speculative.adaptive import AdaptiveGamma
    from massv_jax.speculative.decoder import Answers, SpeculativeDecoder
    from massv_jax.speculative.drafters import LookupDrafter

# name -> module; imported when first used, so that commands which need none start fast.
_EXPORTS = {
    "AdaptiveGamma": "speculative.adaptive",
    "Answers": "speculative.decoder",
    "Drafter": "drafter",
    "DrafterConfig": "drafter_config",
    "LookupDrafter": "speculative.drafters",
    "SpeculativeDecoder": "speculative.decoder",
    "limit_pixels": "pixels",
    "load_drafter": "loading",
    "make_drafter": "loading",
}

__all__ = [
    "AdaptiveGamma",
    "Answers",
    "Drafter",
    "DrafterConfig",
    "LookupDrafter",
    "SpeculativeDecoder",
    "limit_pixels",
    "load_drafter",
    "make_drafter",
]


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"massv_jax.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
