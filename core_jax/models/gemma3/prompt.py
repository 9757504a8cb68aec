"""Prompts with images, checked on the host."""

from typing import Any

import numpy as np

from core_jax.models.gemma3.config import Gemma3Config


class ImagePromptError(ValueError):
    """A prompt's placeholders and its images do not match; the message names every row."""


def check_placeholders(ids: Any, images: Any, config: Gemma3Config) -> None:
    """Raises unless every row has the placeholders of its images; run on the host.

    Under `jit` a wrong number would go unnoticed: tokens of another image, or none, would stand
    in the wrong places.

    Args:
      ids: int [B, T].
      images: the number of images of each row, [B].
      config: the model's.

    Raises:
      ImagePromptError: naming every row whose placeholders are too few, too many, or not in runs of
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
        raise ImagePromptError(f"Gemma 3: prompts and images do not fit: {'; '.join(problems)}")
