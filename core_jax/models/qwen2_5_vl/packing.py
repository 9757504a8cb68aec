"""Images and prompts of any size in arrays of fixed shape; numpy, on the host.

Each image is cut into attention windows, and every window gets all its slots. An image of 3 x 5
image tokens in windows of 2 x 2 tokens, each token one letter (. is padding):

    a b | c d | e         window 0  1  2  3  4  5
    f g | h i | j    ->          ab cd e. kl mn o.
    ---------------              fg hi j. .. .. ..
    k l | m n | o

So attention in windows is a reshape, and the only gather is the one that puts image tokens into
the prompt. Several images share a row; `segments` keep them apart.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import flax.struct
import numpy as np

from core_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig, Qwen2_5_VLVisionConfig

Grid = tuple[int, int, int]  # frames, rows, columns of patches

# Windows of a row. Each size is a program to compile; the steps keep padding below a third. After
# the last come steps of a quarter (`row_windows`): released processors let images of 1,365 windows
# through, and several may have to share a row.
WINDOW_BUCKETS = (
    1, 2, 3, 4, 6, 9, 12, 16, 20, 25, 30, 36, 49, 64, 81, 100, 121, 144, 196, 256, 324, 400, 512,
    676, 832, 1024,
)  # fmt: skip


class ImagePromptError(ValueError):
    """Images and the placeholders of a prompt do not fit; the message says where."""


@flax.struct.dataclass
class ImageBatch:
    """Packed images: R rows of S = windows * patches of a window; C numbers in a patch.

    Attributes:
      patches: float32 [R, S, C], zero at padding.
      positions: int32 [R, S, 2], row and column of a patch in its image.
      segments: int32 [R, S], the frame of this row that a patch belongs to, from 1; 0: padding.
    """

    patches: Any
    positions: Any
    segments: Any


@dataclasses.dataclass(frozen=True)
class PackedImages:
    """What `pack_images` returns.

    Attributes:
      batch: the arrays.
      token_slots: for each image int32 [tokens]: where its image tokens lie among the R * U
        packed ones, from left to right and from top to bottom, frame by frame.
      grids: the images' sizes, in patches.
    """

    batch: ImageBatch
    token_slots: tuple[np.ndarray, ...]
    grids: tuple[Grid, ...]


def num_image_tokens(grid: Sequence[int] | np.ndarray, config: Qwen2_5_VLVisionConfig) -> int:
    """Placeholders that an image needs.

    Raises:
      ImagePromptError: the grid does not divide into image tokens.
    """
    frames, rows, columns = (int(n) for n in grid)
    m = config.spatial_merge_size
    if min(frames, rows, columns) < 1 or rows % m or columns % m:
        raise ImagePromptError(
            f"a grid of {frames} x {rows} x {columns} patches does not divide into image tokens "
            f"of {m} x {m} patches; resize images to multiples of {m * config.patch_size} pixels"
        )
    return frames * rows * columns // config.merge_unit


def num_windows(grid: Sequence[int] | np.ndarray, config: Qwen2_5_VLVisionConfig) -> int:
    """Windows that an image is cut into, partial ones included."""
    frames, rows, columns = (int(n) for n in grid)
    side = config.window_side * config.spatial_merge_size
    return frames * -(-rows // side) * -(-columns // side)


def row_windows() -> Iterator[int]:
    """The sizes that a row may have, in windows, from small to large without an end."""
    yield from WINDOW_BUCKETS
    windows = WINDOW_BUCKETS[-1]
    while True:
        windows += windows // 4
        yield windows


def pack_images(
    patches: Sequence[np.ndarray],
    grids: Sequence[Sequence[int]] | np.ndarray,
    config: Qwen2_5_VLVisionConfig,
    *,
    rows: int | None = None,
    windows: int | None = None,
) -> PackedImages:
    """Puts images into rows of whole windows.

    An image goes into the row that is emptiest so far, the first of them; with as many rows as
    images of one size, image i is row i.

    Args:
      patches: for each image [patches, C] in the order of transformers' image processor.
      grids: for each image (frames, rows, columns) in patches.
      config: of the vision tower.
      rows: R; one for each image by default.
      windows: windows of a row; the smallest fitting one of `row_windows` by default, so that
        images which are packed together never fail where each of them alone fits.

    Raises:
      ImagePromptError: no image, a grid that is not its patches', or images that do not fit into
        `windows`.
    """
    sizes = [(int(t), int(h), int(w)) for t, h, w in grids]
    if not sizes or len(sizes) != len(patches):
        raise ImagePromptError(f"{len(patches)} images, {len(sizes)} grids; give one each, or None")
    for i, (image, grid) in enumerate(zip(patches, sizes, strict=True)):
        want = (num_image_tokens(grid, config) * config.merge_unit, config.patch_values)
        if image.shape != want:
            raise ImagePromptError(f"image {i}: patches {image.shape}, its grid {grid} asks {want}")
    needs = [num_windows(grid, config) for grid in sizes]
    rows = len(sizes) if rows is None else rows
    candidates = row_windows() if windows is None else (windows,)
    placed = next((p for n in candidates if (p := _place(needs, rows, n)) is not None), None)
    if placed is None:
        raise ImagePromptError(
            f"images of {needs} windows do not fit into {rows} rows of {windows}; "
            "lower max_pixels, or allow more windows"
        )
    places, windows = placed
    return _fill(patches, sizes, places, rows, windows, config)


def _place(needs: list[int], rows: int, windows: int) -> tuple[list[tuple[int, int]], int] | None:
    """(row, first window) for each image, and the windows of a row; None if they don't fit."""
    used = [0] * rows
    places = []
    for need in needs:
        row = min(range(rows), key=used.__getitem__)
        if used[row] + need > windows:
            return None
        places.append((row, used[row]))
        used[row] += need
    return places, windows


def _fill(patches, sizes, places, rows, windows, config) -> PackedImages:
    unit = config.merge_unit
    slots = windows * config.window_patches
    batch = ImageBatch(
        patches=np.zeros((rows, slots, config.patch_values), np.float32),
        positions=np.zeros((rows, slots, 2), np.int32),
        segments=np.zeros((rows, slots), np.int32),
    )
    segments = [0] * rows
    token_slots = []
    for image, grid, (row, first) in zip(patches, sizes, places, strict=True):
        tokens = first * config.window_side**2 + _window_order(grid, config)
        where = (tokens[:, None] * unit + np.arange(unit)).reshape(-1)
        batch.patches[row, where] = image
        batch.positions[row, where] = _patch_positions(grid, config)
        frames = np.repeat(np.arange(grid[0]), grid[1] * grid[2])
        batch.segments[row, where] = segments[row] + 1 + frames
        segments[row] += grid[0]
        token_slots.append((row * (slots // unit) + tokens).astype(np.int32))
    return PackedImages(batch, tuple(token_slots), tuple(sizes))


def _window_order(grid: Grid, config: Qwen2_5_VLVisionConfig) -> np.ndarray:
    """The slot of every image token when the image's windows follow one another."""
    m, side = config.spatial_merge_size, config.window_side
    frame, row, column = np.indices((grid[0], grid[1] // m, grid[2] // m)).reshape(3, -1)
    down, across = -(-(grid[1] // m) // side), -(-(grid[2] // m) // side)
    window = (frame * down + row // side) * across + column // side
    return window * side**2 + row % side * side + column % side


def _patch_positions(grid: Grid, config: Qwen2_5_VLVisionConfig) -> np.ndarray:
    """[patches, 2], row and column, token by token."""
    m = config.spatial_merge_size
    places = np.indices(grid[1:]).reshape(2, grid[1] // m, m, grid[2] // m, m)
    places = places.transpose(1, 3, 2, 4, 0).reshape(-1, 2)
    return np.tile(places, (grid[0], 1))


@flax.struct.dataclass
class PromptPlaces:
    """Where the tokens of prompts stand, and which of them are image tokens.

    Attributes:
      positions: int32 [3, B, P]: time, row and column for the rotary embeddings; 0 at padding.
      next_positions: int32 [B]: all three positions of the token that follows the prompt.
      image_slots: int32 [B, P]: which packed image token stands here; -1 where there is text.
    """

    positions: Any
    next_positions: Any
    image_slots: Any


def place_prompts(
    ids: np.ndarray,
    valid: np.ndarray | None,
    images: PackedImages | None,
    config: Qwen2_5_VLConfig,
) -> PromptPlaces:
    """Positions of every token (transformers' `get_rope_index`), and the images' tokens.

    Text counts on by one. The tokens of an image all have the time of its start (of its frame),
    and the start plus their row and column; what follows starts after the larger side.

    Args:
      ids: int [B, P], with one placeholder for each image token.
      valid: bool [B, P], False at padding; None where there is none.
      images: in the order in which the rows, one after the other, name them; None for text.
      config: of the model.

    Raises:
      ImagePromptError: placeholders and images do not match, or there is a video.
    """
    ids = np.asarray(ids)
    valid = np.ones(ids.shape, bool) if valid is None else np.asarray(valid, bool)
    positions = np.zeros((3, *ids.shape), np.int32)
    image_slots = np.full(ids.shape, -1, np.int32)
    following = np.zeros(ids.shape[0], np.int32)
    if np.any((ids == config.video_token_id) & valid):
        raise ImagePromptError(
            f"token {config.video_token_id} stands for a video; only images can be read"
        )
    used = 0
    for row, (tokens, real) in enumerate(zip(ids, valid, strict=True)):
        places = np.flatnonzero(real)
        found, slots, following[row], used = _place_row(
            tokens[places], images, used, config, where=f"row {row}"
        )
        positions[:, row, places] = found
        image_slots[row, places] = slots
    total = 0 if images is None else len(images.grids)
    if used != total:
        raise ImagePromptError(
            f"{total} images, but the prompts have placeholders (token {config.image_token_id}) "
            f"for {used}; pass exactly the images that the prompts name, in their order"
        )
    return PromptPlaces(positions, following, image_slots)


def _place_row(tokens, images, used, config, *, where):
    """(positions [3, n], slots [n], next position, images used so far) of one row's tokens."""
    positions = np.zeros((3, len(tokens)), np.int32)
    slots = np.full(len(tokens), -1, np.int32)
    is_image = tokens == config.image_token_id
    starts = np.flatnonzero(np.diff(is_image, prepend=~is_image[:1]))  # of runs of one kind
    now = 0
    for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
        if not is_image[start]:
            positions[:, start:stop] = now + np.arange(stop - start)
            now += stop - start
            continue
        grid, image_slots = _image(images, used, config, where=f"{where}, token {start}")
        if stop - start != len(image_slots):
            raise ImagePromptError(
                f"{where}, token {start}: {stop - start} placeholders (token "
                f"{config.image_token_id}) for image {used}, which has {len(image_slots)} image "
                f"tokens (grid {grid} of patches); was the prompt cut, or made for another size?"
            )
        m = config.vision_config.spatial_merge_size
        cells = np.indices((grid[0], grid[1] // m, grid[2] // m)).reshape(3, -1)
        positions[:, start:stop] = now + cells
        slots[start:stop] = image_slots
        now, used = now + max(grid[1:]) // m, used + 1
    return positions, slots, now, used


def _image(images, used, config, *, where):
    if images is None or used >= len(images.grids):
        total = 0 if images is None else len(images.grids)
        raise ImagePromptError(
            f"{where}: a placeholder (token {config.image_token_id}) for image {used}, but "
            f"{total} images were given"
        )
    return images.grids[used], images.token_slots[used]
