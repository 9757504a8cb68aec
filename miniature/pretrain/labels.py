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


class Probe(nn.Module):
    """Every cell and the two background colours look at all features once, then are classified.

    Attributes:
      features: width of the attention.
    """

    features: int

    @nn.compact
    def __call__(
        self, states: Float[Array, "B T D"]
    ) -> tuple[list[Float[Array, "B 9 n"]], Float[Array, "B 2 n"]]:
        """Logits of each attribute, and of the backgrounds."""
        B = states.shape[0]
        queries = self.param("queries", nn.initializers.normal(1.0), (CELLS + 2, self.features))
        found = nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=self.features)(
            jnp.broadcast_to(queries[None], (B, *queries.shape)), states
        )
        found = nn.gelu(nn.Dense(self.features)(found))
        cells, backgrounds = found[:, :CELLS], found[:, CELLS:]
        logits = [nn.Dense(len(values))(cells) for _, values in _ATTRIBUTES]
        return logits, nn.Dense(len(_BACKGROUNDS))(backgrounds)


def init_probe(probe: Probe, dim: int, key: jax.Array) -> dict:
    """Fresh parameters for states of a width."""
    return probe.init(key, jnp.zeros((1, 1, dim)))["params"]


def probe_loss(
    logits: tuple[list[Array], Array],
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
