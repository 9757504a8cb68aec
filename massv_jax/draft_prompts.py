"""A drafter's own view of the target's prompts, where it is not the target's.

A drafter that pools sees one token for each square of image tokens; it stands where the square's
first (upper left) token stood, with that token's positions, and what follows keeps the target's
positions. A drafter for text sees no image and none of its markers, and counts its own positions:
the paper's baseline. Numpy, on the host, but for `PoolingDecoder`.

For a row `<ab/cd>e` with an image of 2 x 2 tokens between markers:

    target            < a b c d > e
    pooling 2         < A > e           A = mean(a, b, c, d), in a's place
    text              e
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import numpy as np
from jaxtyping import Array, Float

from core_jax.decode.qwen2_5_vl import ImagePrompt, ImageTextDecoder, ImageTextState
from core_jax.models.qwen2_5_vl.packing import PackedImages, PromptPlaces
from massv_jax.drafter_config import DrafterConfig
from massv_jax.projector import pool_tokens


@dataclasses.dataclass(frozen=True)
class DraftView:
    """What a drafter sees of a batch of prompts.

    Attributes:
      ids: int32 [B, T].
      valid: bool [B, T].
      source: int32 [B, T], which of the target's places of that row each token is; -1 at padding.
      places: positions and slots of image tokens; None where the drafter needs none.
    """

    ids: np.ndarray
    valid: np.ndarray
    source: np.ndarray
    places: PromptPlaces | None


def draft_view(
    config: DrafterConfig,
    ids: np.ndarray,
    valid: np.ndarray,
    places: PromptPlaces | None = None,
    images: PackedImages | None = None,
    *,
    length: int | None = None,
    side: str = "left",
    pad_id: int = 0,
) -> DraftView:
    """The drafter's tokens of the target's prompts.

    Args:
      config: of the drafter.
      ids: int [B, P], the target's.
      valid: bool [B, P].
      places: the target's positions (Qwen2.5-VL).
      images: the target's packed images (Qwen2.5-VL), whose grids are pooled.
      length: T; the longest row's if None.
      side: of the padding.
      pad_id: fills it.

    Raises:
      ValueError: a row is longer than `length`.
    """
    ids, valid = np.asarray(ids), np.asarray(valid, bool)
    keep = valid & _kept(config, ids, places, images)
    longest = int(keep.sum(axis=1).max(initial=0))
    T = longest if length is None else length
    if longest > T:
        raise ValueError(f"a drafter's prompt of {longest} tokens is longer than {T}; raise it")
    source = np.full((len(ids), T), -1, np.int32)
    for row, kept in enumerate(keep):
        at = np.flatnonzero(kept)
        start = T - len(at) if side == "left" else 0
        source[row, start : start + len(at)] = at
    real = source >= 0
    taken = np.maximum(source, 0)
    new_ids = np.where(real, np.take_along_axis(ids, taken, axis=1), pad_id).astype(np.int32)
    new_places = None
    if places is not None and config.kind in ("merger", "mlp"):
        moved = np.take_along_axis(places.positions, np.stack([taken] * 3), axis=2)
        slots = np.take_along_axis(places.image_slots, taken, axis=1)
        new_places = PromptPlaces(
            positions=np.where(real[None], moved, 0).astype(np.int32),
            next_positions=places.next_positions,
            image_slots=np.where(real, slots, -1).astype(np.int32),
        )
    return DraftView(new_ids, real, source, new_places)


def _kept(config, ids, places, images) -> np.ndarray:
    if config.kind == "text":
        hidden = (config.image_token_id, *config.marker_ids)
        return ~np.isin(ids, [i for i in hidden if i is not None])
    if config.pooling == 1 or config.kind == "prefix":
        return np.ones(ids.shape, bool)
    if config.kind == "gemma":
        return _kept_of_squares(config, ids)
    if places is None or images is None:
        return np.ones(ids.shape, bool)
    leaders = pooling_leaders(config, images)
    slots = np.asarray(places.image_slots)
    return (slots < 0) | (leaders.reshape(-1)[np.maximum(slots, 0)] == slots)


def _kept_of_squares(config: DrafterConfig, ids: np.ndarray) -> np.ndarray:
    """Gemma's images are runs of equal length; the first of each square's tokens stays."""
    side, p = config.target.tokens_per_side, config.pooling
    is_image = ids == config.image_token_id
    number = np.cumsum(is_image, axis=1) - 1
    cell = number % (side * side)
    leads = (cell // side % p == 0) & (cell % side % p == 0)
    return ~is_image | leads


def pooling_leaders(config: DrafterConfig, images: PackedImages) -> np.ndarray:
    """int32 [R, U]: for each packed image token the slot of its square's first, over all rows.

    Squares at the right and at the bottom of an image may be cut. Slots without a token lead
    themselves.
    """
    unit = config.target.vision_config.spatial_merge_size
    R, S = images.batch.segments.shape
    leaders = np.arange(R * S // unit**2, dtype=np.int32)
    for grid, slots in zip(images.grids, images.token_slots, strict=True):
        frames, rows, columns = grid[0], grid[1] // unit, grid[2] // unit
        cells = slots.reshape(frames, rows, columns)
        p = config.pooling
        row, column = np.arange(rows) // p * p, np.arange(columns) // p * p
        leaders[cells.reshape(-1)] = cells[:, row][:, :, column].reshape(-1)
    return leaders.reshape(R, -1)


@flax.struct.dataclass
class PoolingPrompt:
    """What a pooling drafter begins with.

    Attributes:
      prompt: its own prompt (see `draft_view`).
      leaders: int32 [R, U]; see `pooling_leaders`.
    """

    prompt: ImagePrompt
    leaders: jax.Array


@dataclasses.dataclass(frozen=True)
class PoolingDecoder(ImageTextDecoder):
    """An `ImageTextDecoder` whose image tokens are pooled before they are read."""

    def begin(
        self,
        params: Any,
        prompt: PoolingPrompt,
        vision: Float[Array, "R S Dv"] | None,
        *,
        max_new_tokens: int,
        window: int,
    ) -> tuple[Float[Array, "B V"], ImageTextState]:
        """See `WindowDecoder`."""
        own = prompt.prompt
        if vision is not None:
            tokens = self._apply(params, "merge_vision", vision)
            flat = tokens.reshape(1, -1, tokens.shape[-1])
            pooled = pool_tokens(flat, prompt.leaders.reshape(1, -1))
            own = dataclasses.replace(own, image_tokens=pooled)
        return super().begin(params, own, None, max_new_tokens=max_new_tokens, window=window)
