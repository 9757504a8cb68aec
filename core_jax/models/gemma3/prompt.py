"""Prompts with images: the host's checks, and a decoder that continues them."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from core_jax.decode.adapters import CausalDecoder, _CausalState
from core_jax.models.gemma3.config import Gemma3Config


@flax.struct.dataclass
class Gemma3Prefix:
    """A prompt of tokens and images.

    Attributes:
      ids: int [B, P], with placeholders.
      image_tokens: [B, I, D], what `encode_image` gave for each row's images, in order; rows
        with fewer images are filled with anything. None where no row has one.
      valid: bool [B, P], False at padding on either side; None where there is none.
    """

    ids: jax.Array
    image_tokens: jax.Array | None = None
    valid: jax.Array | None = None


class Gemma3Decoder(CausalDecoder):
    """Gemma 3 with images, for `core_jax.decode.generate`.

    Attributes:
      model: a `Gemma3ForConditionalGeneration`.
    """

    def prefill(
        self, params: Any, prefix: Gemma3Prefix, *, max_new_tokens: int
    ) -> tuple[Float[Array, "B V"], Any]:
        """Runs the whole prompt."""
        B, P = prefix.ids.shape
        embeds = self._apply(params, "embed_prompt", prefix.ids, prefix.image_tokens)
        blocks = None
        if prefix.image_tokens is not None:
            blocks = self._apply(params, "image_blocks", prefix.ids)
        valid = jnp.ones((B, P), bool) if prefix.valid is None else prefix.valid.astype(bool)
        cache = self._apply(params, "new_cache", B, P + max_new_tokens)
        cache, positions, view = cache.claim(valid, blocks)
        hidden, cache = self._apply(params, "hidden_states", embeds, positions, view, cache)
        return self._last_logits(params, hidden, valid), _CausalState(cache, prefix=P)


def check_placeholders(ids: Any, images: Any, config: Gemma3Config) -> None:
    """Raises unless every row has the placeholders of its images; run on the host.

    Under `jit` a wrong number would go unnoticed: tokens of another image, or none, would stand
    in the wrong places.

    Args:
      ids: int [B, T].
      images: the number of images of each row, [B].
      config: the model's.

    Raises:
      ValueError: naming every row whose placeholders are too few, too many, or not in runs of
        one image each.
    """
    ids, per_image = np.asarray(ids), config.mm_tokens_per_image
    problems = []
    for row, (tokens, count) in enumerate(zip(ids, np.asarray(images), strict=True)):
        is_image = np.concatenate([[0], tokens == config.image_token_index, [0]]).astype(int)
        edges = np.flatnonzero(np.diff(is_image))
        runs = edges[1::2] - edges[::2]
        if is_image.sum() != count * per_image:
            problems.append(
                f"row {row} has {is_image.sum()} placeholders (token {config.image_token_index}), "
                f"but {count} images of {per_image} tokens each"
            )
        elif (runs != per_image).any():
            problems.append(
                f"row {row} has runs of {runs.tolist()} placeholders; each image needs a run of "
                f"{per_image} of its own, between a begin and an end token"
            )
    if problems:
        raise ValueError(f"Gemma 3: prompts and images do not fit: {'; '.join(problems)}")
