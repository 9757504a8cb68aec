"""What is in which cell of a scene, as class numbers, and a probe that reads it from features.

The towers on the hub have seen labels, boxes and pairs by the hundred million before VLV takes
them over. A stand-in gets to the same point in minutes by first learning to say what stands in
every cell; the probe is thrown away.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

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


def init_probe(probe: nn.Module, shape: tuple[int, ...], key: jax.Array) -> Mapping[str, Any]:
    """Fresh parameters for features of a shape, without the batch."""
    return probe.init(key, jnp.zeros((1, *shape)))["params"]


def recolour(images: Int[Array, "B h w 3"], key: jax.Array) -> Float[Array, "B h w 3"]:
    """Every picture with its channels mixed by a random matrix; values stay in 0..255."""
    weights = jax.random.uniform(key, (images.shape[0], 3, 3), minval=-1.0, maxval=1.0)
    weights = weights / jnp.sum(jnp.abs(weights), axis=1, keepdims=True)
    mixed = jnp.einsum("bhwc,bcd->bhwd", images.astype(jnp.float32) - 127.5, weights)
    return mixed + 127.5


def hide_colours(batch: Mapping[str, Array], hidden: Bool[Array, " B"]) -> dict[str, Array]:
    """Labels of which colours, those of the background too, are ignored in some rows."""
    cells, backgrounds = batch["cells"], batch["backgrounds"]
    colour = jnp.where(hidden[:, None], _IGNORED, cells[..., 1])
    return {
        "cells": cells.at[..., 1].set(colour),
        "backgrounds": jnp.where(hidden[:, None], _IGNORED, backgrounds),
    }


def probe_loss(
    logits: Logits,
    cells: Int[Array, "B 9 4"],
    backgrounds: Int[Array, "B 2"],
) -> tuple[Array, dict[str, Array]]:
    """Mean cross-entropies; `objects_right`: objects with shape, colour, size right as far as told.

    Negative labels are ignored.
    """
    total = _mean_loss(logits[1], backgrounds)[0]
    filled = cells[..., 0] > 0
    right, metrics = filled, {}
    for (name, _), attribute, target in zip(
        _ATTRIBUTES, logits[0], jnp.moveaxis(cells, -1, 0), strict=True
    ):
        loss, hit = _mean_loss(attribute, target)
        total += loss
        metrics[f"{name}_right"] = jnp.sum(hit & filled) / jnp.sum(filled)
        if name != "texture":
            right &= hit
    return total, metrics | {"objects_right": jnp.sum(right) / jnp.sum(filled)}


def _mean_loss(logits: Array, target: Array) -> tuple[Array, Array]:
    """Mean cross-entropy where a label is told, and where the guess is right or not asked for."""
    target = target.astype(jnp.int32)
    told = target >= 0
    losses = token_cross_entropy(logits, jnp.maximum(target, 0)) * told
    hit = (jnp.argmax(logits, -1) == target) | ~told
    return jnp.sum(losses) / jnp.maximum(jnp.sum(told), 1), hit
