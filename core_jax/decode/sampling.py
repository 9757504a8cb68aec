"""Rules that turn logits into a token.

The order is that of transformers' warpers: repetition penalty, temperature, top-k, top-p.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

# Below it logits are taken from the row's maximum before they are divided: they would overflow.
# Above it they are transformers' own numbers.
_SMALL_TEMPERATURE = 1e-2


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingRule:
    """How a token is chosen.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token and needs no key.
      top_k: keeps the k most likely tokens (and those tied with the last); 0 keeps all.
      top_p: keeps the smallest set of most likely tokens with at least this probability; 1.0
        keeps all.
      repetition_penalty: divides positive and multiplies negative logits of tokens already
        generated (arXiv 1909.05858); 1.0 does nothing.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature {self.temperature} is not a number from 0 up; 0 takes the most "
                "likely token"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k} is negative; 0 keeps every token")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is not in (0, 1]; 1.0 keeps every token")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(
                f"repetition_penalty {self.repetition_penalty} is not a positive number; 1.0 does "
                "nothing"
            )

    @property
    def greedy(self) -> bool:
        """Whether no randomness is involved."""
        return self.temperature == 0


def warp_logits(logits: Float[Array, "B V"], rule: SamplingRule) -> Float[Array, "B V"]:
    """The logits of the distribution that is sampled: temperature, then top-k, then top-p.

    Returns:
      float32; -inf where a token is excluded. Greedy rules leave the logits as they are.
    """
    logits = logits.astype(jnp.float32)
    if rule.greedy:
        return logits
    if rule.temperature < _SMALL_TEMPERATURE:
        logits = cool_logits(logits, jnp.float32(rule.temperature))
    else:
        logits = logits / rule.temperature
    if 0 < rule.top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, rule.top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if rule.top_p < 1:
        logits = _keep_top_p(logits, rule.top_p)
    return logits


def cool_logits(
    logits: Float[Array, "*B V"], temperature: Float[Array, "*#B #V"]
) -> Float[Array, "*B V"]:
    """Logits divided by temperatures that may be as small as they like.

    Where a quotient could overflow, the row's maximum becomes 0, which leaves the softmax as it is.
    """
    best = jnp.max(logits, axis=-1, keepdims=True)
    logits = logits - jnp.where(temperature < _SMALL_TEMPERATURE, best, 0.0)
    # Smaller numbers count as zero on most devices, and 0 / 0 is NaN.
    return logits / jnp.maximum(temperature, jnp.finfo(jnp.float32).tiny)


def _keep_top_p(logits: Float[Array, "B V"], top_p: float) -> Float[Array, "B V"]:
    order = jnp.argsort(logits, axis=-1)  # ascending and stable, as in transformers
    ascending = jnp.take_along_axis(logits, order, axis=-1)
    drop = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1) <= 1 - top_p
    drop = drop.at[:, -1].set(False)
    rank = jnp.argsort(order, axis=-1)  # the place of each token in that order
    return jnp.where(jnp.take_along_axis(drop, rank, axis=-1), -jnp.inf, logits)


def penalize_repetition(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: float
) -> Float[Array, "B V"]:
    """Makes tokens that were seen less likely (arXiv 1909.05858)."""
    penalized = jnp.where(logits < 0, logits * penalty, logits / penalty)
    return jnp.where(seen, penalized, logits)


def choose_token(
    logits: Float[Array, "B V"], rule: SamplingRule, keys: Key[Array, " B"] | None = None
) -> Int[Array, " B"]:
    """One token a row.

    Args:
      logits: of the next token.
      rule: how to choose.
      keys: a key for each row, so that a row's choice depends on nothing but its own key and
        logits. Not needed for a greedy rule.

    Raises:
      ValueError: the rule samples, and there are no keys.
    """
    warped = warp_logits(logits, rule)
    if rule.greedy:
        return jnp.argmax(warped, axis=-1).astype(jnp.int32)
    if keys is None:
        raise ValueError("a rule that samples needs a key for each row")
    return jax.vmap(jax.random.categorical)(keys, warped).astype(jnp.int32)
