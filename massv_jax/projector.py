"""The one new network of a drafter: from what the target's tower says to the drafter's width.

`merger` is Qwen2.5-VL's own (34.09 M parameters for 7B and 1.5B), `gemma` Gemma 3's own (1.33 M for
the 1B), `mlp` reads image tokens that the target has merged (7.87 M) and `prefix` the embeddings of
a target such as VLV's captioner. The paper does not say where it taps the tower or how its
projector is shaped; a drafter of the stock forms loads wherever its target's family does.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from core_jax.models.gemma3.model import PooledProjector
from core_jax.models.qwen2_5_vl.vision import PatchMerger
from core_jax.nn.layers import Linear, gelu
from massv_jax.drafter_config import DrafterConfig


class MlpProjector(nn.Module):
    """Linear, GELU, Linear, as LLaVA-1.5's.

    Attributes:
      features: D of the drafter.
    """

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "B P E"]) -> Float[Array, "B P D"]:
        """Maps each image token."""
        hidden = gelu(Linear(self.features, name="fc1")(x))
        return Linear(self.features, name="fc2")(hidden)


def make_projector(config: DrafterConfig) -> nn.Module | None:
    """The module of a drafter's kind; None for text alone."""
    width = config.text.hidden_size
    if config.kind == "merger":
        return PatchMerger(width, config.target.vision_config.merge_unit)
    if config.kind == "gemma":
        whole = config.whole
        return PooledProjector(
            whole.tokens_per_side, width, config.target.vision_config.layer_norm_eps
        )
    return MlpProjector(width) if config.kind in ("mlp", "prefix") else None


def example_features(config: DrafterConfig) -> jax.ShapeDtypeStruct:
    """The smallest input of the projector, as a shape."""
    shapes = {
        "merger": lambda t: (1, t.vision_config.merge_unit, t.vision_config.hidden_size),
        "mlp": lambda t: (1, 1, t.vision_config.out_hidden_size),
        "gemma": lambda t: (1, *(t.vision_config.patches_per_side,) * 2,
                            t.vision_config.hidden_size),
        "prefix": lambda t: (1, 1, t.embed_dim),
    }  # fmt: skip
    return jax.ShapeDtypeStruct(shapes[config.kind](config.target), jnp.float32)


def init_projector(config: DrafterConfig, key: jax.Array) -> dict[str, Any]:
    """Fresh float32 parameters, none of whose matrices is zero.

    transformers starts Gemma 3's matrix from zeros: with it a fresh drafter would see nothing, and
    only its gradient would tell that it is wired up at all.
    """
    projector = make_projector(config)
    if projector is None:
        return {}
    example = example_features(config)
    return jax.jit(projector.init)(key, jnp.zeros(example.shape, example.dtype))["params"]


def copy_merger(projector: Mapping[str, Any], target: Mapping[str, Any]) -> dict[str, Any]:
    """A `merger` whose normalisation and first layer are the target's; the second is its own.

    Both read the same patches, so the first layer's features may serve; the second maps into
    another model's space.

    Raises:
      ValueError: the shapes differ, so the towers do.
    """
    copied = dict(projector)
    for name in ("ln_q", "mlp_0"):
        ours, theirs = (jax.tree.map(jnp.shape, tree[name]) for tree in (projector, target))
        if ours != theirs:
            raise ValueError(f"merger/{name}: the target's shapes {theirs} are not {ours}")
        copied[name] = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), dict(target[name]))
    return copied


def pool_tokens(tokens: Float[Array, "B U D"], leaders: Int[Array, "B U"]) -> Float[Array, "B U D"]:
    """Means of groups of image tokens, each where its leader stands; what else is there is junk.

    Args:
      tokens: image tokens of each row.
      leaders: for each token the place, in its row, of its group's leader.
    """

    def one(x, group):
        sums = jnp.zeros(x.shape, jnp.float32).at[group].add(x.astype(jnp.float32))
        counts = jnp.zeros(x.shape[:1], jnp.float32).at[group].add(1.0)
        return (sums / jnp.maximum(counts, 1.0)[:, None]).astype(x.dtype)

    return jax.vmap(one)(tokens, leaders)
