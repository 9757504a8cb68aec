"""VLV (arXiv 2507.07104): an image as 77 caption embeddings, and the caption read from them.

`vlv_jax.Captioner.from_pretrained(directory).caption(images)` and
`vlv_jax.Autoencoder.from_pretrained(directory)` with `.encode` and `.reconstruct` are what most
users need; they are imported when first asked for, so that importing a part stays cheap.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlv_jax.inference import Autoencoder, Captioner

__all__ = ["Autoencoder", "Captioner"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from vlv_jax import inference

        return getattr(inference, name)
    raise AttributeError(f"module 'vlv_jax' has no attribute {name!r}")
