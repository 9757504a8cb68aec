"""Scaled dot-product attention with grouped key-value heads, and its masks."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from core_jax.ops.execution import AttentionBackend
from core_jax.ops.splash import Causal, Segments, kernel_fits, splash_attention

# Far below any logit, yet finite: a row without any visible key gives a mean, not NaN.
_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def dot_product_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    mask: Bool[Array, "#B #T S"] | Causal | Segments | None = None,
    scale: float | None = None,
    backend: AttentionBackend = "xla",
) -> Float[Array, "B T N H"]:
    """Attention of T queries over S keys; N query heads share K key-value heads (N = G * K).

    Args:
      q: queries.
      k: keys.
      v: values.
      mask: True where a query may see a key; broadcast over heads. None sees everything, `Causal`
        what `causal_mask` says, `Segments` what `segment_mask` says.
      scale: factor on the logits; 1 / sqrt(H) by default.
      backend: see `Execution.attention`.

    Returns:
      Weighted values, in the type of `q`. Logits and softmax are float32.
    """
    B, T, N, H = q.shape
    S, K = k.shape[1], k.shape[2]
    factor = float(H**-0.5 if scale is None else scale)
    if (
        backend == "splash"
        and (mask is None or isinstance(mask, Causal | Segments))
        and kernel_fits(q, k, mask=mask)
    ):
        return splash_attention(q, k, v, mask=mask, scale=factor)
    if isinstance(mask, Causal):
        mask = causal_mask(T)
    elif isinstance(mask, Segments):
        mask = segment_mask(mask.ids)
    if backend == "cudnn":
        full = None if mask is None else jnp.broadcast_to(mask[:, None], (B, 1, T, S))
        return jax.nn.dot_product_attention(
            q, k, v, mask=full, scale=factor, implementation="cudnn"
        )
    # Scaling the queries costs T*H instead of T*S products. The factor itself stays float32: in
    # bfloat16 one that is no power of two would be off by up to 0.4 % for every logit.
    scaled = (q.astype(jnp.float32) * factor).astype(q.dtype)
    # The queries of the heads that share keys become one axis of rows, so that every product, the
    # gradients' too, is a plain batched matrix product. With one axis more, XLA's CPU compiler
    # copies the weights transposed: gradients took 1.4 to 2 times as long.
    G = N // K
    rows = scaled.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    logits = jnp.einsum("BKMH,BSKH->BKMS", rows, k, preferred_element_type=jnp.float32)
    if mask is not None:
        by_head = logits.reshape(B, K, G, T, S)
        logits = jnp.where(mask[:, None, None], by_head, _MASKED).reshape(logits.shape)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    out = jnp.einsum("BKMS,BSKH->BKMH", weights, v)
    return out.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def causal_mask(length: int) -> Bool[Array, "1 T T"]:
    """Query i sees keys 0..i.

    For length 3 (rows are queries): 100 / 110 / 111.
    """
    idx = jnp.arange(length)
    return (idx[None, :] <= idx[:, None])[None]


def whole_sequence_mask(length: int, backend: AttentionBackend) -> Bool[Array, "1 T T"] | Causal:
    """`causal_mask`, as a structure where the backend wants one."""
    return Causal() if backend == "splash" else causal_mask(length)


def segment_mask(ids: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """A token sees those of its own segment.

    For ids 112 (rows are queries): 110 / 110 / 001.
    """
    return ids[:, :, None] == ids[:, None, :]


def padding_mask(valid: Bool[Array, "B S"]) -> Bool[Array, "B 1 S"]:
    """Every query sees exactly the valid keys of its row."""
    return valid[:, None, :]


def cache_mask(
    query_slots: Int[Array, "#B T"], valid: Bool[Array, "B S"]
) -> Bool[Array, "B T S"]:
    """A query in cache slot s sees the valid slots 0..s.

    Args:
      query_slots: the slot each query is written to.
      valid: slots that hold a real token (False: padding, or never written).

    For slots [2, 3] and valid 0111: 0110 / 0111.
    """
    keys = jnp.arange(valid.shape[1])
    return (keys[None, None, :] <= query_slots[:, :, None]) & valid[:, None, :]
