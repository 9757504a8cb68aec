"""What is in which cell of a scene, as class numbers, and a probe that reads it from features.

The towers on the hub have seen labels, boxes and pairs by the hundred million before VLV takes
them over. A stand-in gets to the same point in minutes by first learning to say what stands in
every cell; the probe is thrown away.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from core_jax.ops.losses import token_cross_entropy
from miniature.world import Scene
from miniature.world import vocabulary as vocab

CELLS = vocab.GRID**2
# Classes of each attribute of a cell; class 0 of the shape is the empty cell.
_ATTRIBUTES = (
    ("shape", ("", *vocab.SHAPES)),
    ("colour", tuple(vocab.COLOURS)),
    ("size", vocab.SIZES),
    ("texture", vocab.TEXTURES),
)
_BACKGROUNDS = tuple(vocab.BACKGROUNDS)
_IGNORED = -1  # the other attributes of an empty cell


def cell_labels(scenes: Sequence[Scene]) -> np.ndarray:
    """Class numbers int8 [n, 9, 4]: shape, colour, size, texture of every cell."""
    out = np.full((len(scenes), CELLS, len(_ATTRIBUTES)), _IGNORED, np.int8)
    out[:, :, 0] = 0
    for row, scene in zip(out, scenes, strict=True):
        for thing in scene.objects:
            row[thing.cell] = [values.index(getattr(thing, name)) for name, values in _ATTRIBUTES]
    return out


def background_labels(scenes: Sequence[Scene]) -> np.ndarray:
    """Class numbers int8 [n, 2]: the background's upper and lower colour."""
    return np.array(
        [[_BACKGROUNDS.index(s.background.top), _BACKGROUNDS.index(s.background.bottom)]
         for s in scenes], np.int8,
    )  # fmt: skip


Logits = tuple[list[Float[Array, "B 9 n"]], Float[Array, "B 2 m"]]


class _Classifier(nn.Module):
    """Logits of each attribute of nine cells, and of two backgrounds, from a vector each."""

    @nn.compact
    def __call__(self, found: Float[Array, "B 11 D"]) -> Logits:
        found = nn.gelu(nn.Dense(found.shape[-1])(found))
        cells, backgrounds = found[:, :CELLS], found[:, CELLS:]
        logits = [nn.Dense(len(values))(cells) for _, values in _ATTRIBUTES]
        return logits, nn.Dense(len(_BACKGROUNDS))(backgrounds)


class GridProbe(nn.Module):
    """Reads a picture's features where the cells are; the edges' rows tell the background."""

    @nn.compact
    def __call__(self, features: Float[Array, "B h w D"]) -> Logits:
        """Logits of each attribute, and of the backgrounds."""
        B, h, w, D = features.shape
        rows, columns = jnp.asarray(_overlap(h)), jnp.asarray(_overlap(w))
        cells = jnp.einsum("ih,jw,bhwd->bijd", rows, columns, features).reshape(B, CELLS, D)
        edges = jnp.stack([features[:, 0].mean(axis=1), features[:, -1].mean(axis=1)], axis=1)
        return _Classifier()(jnp.concatenate([cells, edges], axis=1))


def _overlap(size: int) -> np.ndarray:
    """How much each of `size` equal parts of a side lies in each cell: [3, size], rows sum to 1."""
    parts, cells = np.arange(size) / size, np.arange(vocab.GRID) / vocab.GRID
    ends = np.minimum(parts[None] + 1 / size, cells[:, None] + 1 / vocab.GRID)
    inside = np.maximum(ends - np.maximum(parts[None], cells[:, None]), 0)
    return (inside * vocab.GRID).astype(np.float32)


class TextProbe(nn.Module):
    """Every cell and the two background colours look once at all states of a caption."""

    @nn.compact
    def __call__(self, states: Float[Array, "B T D"]) -> Logits:
        """Logits of each attribute, and of the backgrounds."""
        B, _, D = states.shape
        queries = self.param("queries", nn.initializers.normal(1.0), (CELLS + 2, D))
        found = nn.MultiHeadDotProductAttention(num_heads=4)(
            jnp.broadcast_to(queries[None], (B, *queries.shape)), states
        )
        return _Classifier()(found)


def init_probe(probe: nn.Module, shape: tuple[int, ...], key: jax.Array) -> dict:
    """Fresh parameters for features of a shape, without the batch."""
    return probe.init(key, jnp.zeros((1, *shape)))["params"]


def probe_loss(
    logits: Logits,
    cells: Int[Array, "B 9 4"],
    backgrounds: Int[Array, "B 2"],
) -> tuple[Array, dict[str, Array]]:
    """Mean cross-entropies, and `objects_right`: objects with shape, colour and size right."""
    of_cells, of_backgrounds = logits
    cells = cells.astype(jnp.int32)
    total = jnp.mean(token_cross_entropy(of_backgrounds, backgrounds.astype(jnp.int32)))
    filled = cells[..., 0] > 0
    right = filled
    for i, attribute in enumerate(of_cells):
        mask = jnp.ones_like(filled) if i == 0 else filled
        target = jnp.maximum(cells[..., i], 0)
        losses = token_cross_entropy(attribute, target) * mask
        total += jnp.sum(losses) / jnp.sum(mask)
        if i < 3:
            right &= jnp.argmax(attribute, -1) == target
    return total, {"objects_right": jnp.sum(right) / jnp.sum(filled)}
