"""VLV (arXiv 2507.07104): an image as 77 caption embeddings, and the caption read from them."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlv_jax.inference import Autoencoder, Caption, Captioner

__all__ = ["Autoencoder", "Caption", "Captioner"]


def __getattr__(name: str):
    """The public classes, imported when they are first used: commands that need none start fast."""
    if name in __all__:
        from vlv_jax import inference

        return getattr(inference, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
