"""The parameters that VLV adds to the pretrained networks: queries, projections."""

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from core_jax.nn.layers import Linear, gelu


class Bridge(nn.Module):
    """Learnable queries q and the projection phi into the text encoder's input space.

    arXiv 2507.07104, section 3.2; `query_embed` and `language_proj` in the released code.

    Attributes:
      num_queries: Q, at most the text encoder's positions (77).
      query_dim: width of the Florence-2 decoder.
      embed_dim: width of the text encoder.
    """

    num_queries: int
    query_dim: int
    embed_dim: int

    def setup(self):
        """The queries and phi."""
        shape = (self.num_queries, self.query_dim)
        self.query_embed = self.param("query_embed", nn.initializers.normal(1.0), shape)
        self.language_proj_0 = Linear(self.embed_dim)
        self.language_proj_2 = Linear(self.embed_dim)

    def queries(self) -> Float[Array, "Q D"]:
        """The learnable queries."""
        return self.query_embed

    def project(self, hidden: Float[Array, "B Q D"]) -> Float[Array, "B Q E"]:
        """Decoder states to caption embeddings z = phi(h)."""
        return self.language_proj_2(gelu(self.language_proj_0(hidden)))

    def __call__(self) -> Float[Array, "B Q E"]:
        """Touches every parameter."""
        return self.project(self.queries()[None])


class CaptionProjector(nn.Module):
    """psi: the text encoder's states to the language model's input space (`mlp` upstream).

    Attributes:
      features: width of the language model.
    """

    features: int

    @nn.compact
    def __call__(self, context: Float[Array, "B Q E"]) -> Float[Array, "B Q D"]:
        """Linear, GELU, Linear."""
        hidden = gelu(Linear(self.features, name="layers_0")(context))
        return Linear(self.features, name="layers_2")(hidden)


def init_bridge(bridge: Bridge, key: jax.Array) -> dict:
    """Fresh float32 parameters; torch's Linear default is uniform of the same variance."""
    return jax.jit(bridge.init)(key)["params"]


def init_projector(projector: CaptionProjector, embed_dim: int, key: jax.Array) -> dict:
    """Fresh float32 parameters."""
    return jax.jit(projector.init)(key, jax.numpy.zeros((1, 1, embed_dim)))["params"]
