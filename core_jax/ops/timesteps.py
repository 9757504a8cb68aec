"""The sinusoidal embedding of diffusion timesteps."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def timestep_embedding(
    timesteps: Int[Array, " B"] | Float[Array, " B"],
    dim: int,
    *,
    flip_sin_to_cos: bool = True,
    freq_shift: int | float = 0,
    max_period: float = 10_000.0,
) -> Float[Array, "B D"]:
    """Sines and cosines of the timestep at `dim // 2` frequencies (arXiv 2006.11239, appendix B).

    Args:
      timesteps: positions in the noise schedule; they may be fractional.
      dim: D; an odd one ends in a zero.
      flip_sin_to_cos: cosines first, as in Stable Diffusion.
      freq_shift: the lowest frequency is max_period ** -((half - 1) / (half - freq_shift)).
      max_period: the longest period, in timesteps over 2 pi.

    Returns:
      float32 whatever the model computes in: in bfloat16 neighbouring timesteps would be equal.
    """
    half = dim // 2
    # On the host: one rounding here is multiplied by a timestep of up to 1000.
    exponent = -math.log(max_period) * np.arange(half, dtype=np.float32) / (half - freq_shift)
    frequencies = jnp.asarray(np.exp(exponent.astype(np.float32)))
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies[None, :]
    parts = [jnp.sin(angles), jnp.cos(angles)]
    embedding = jnp.concatenate(parts[::-1] if flip_sin_to_cos else parts, axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, dim % 2)))
