"""What a drafter learns from: labels, or the target's whole distribution.

The paper's phase 2 is cross-entropy on answers that the target wrote. A draft x ~ q is accepted
with probability sum_v min(p, q) = 1 - TVD(p, q), so losses on p itself say more a token; they cost
a pass of the target, or stored top-k probabilities. All sums over the vocabulary are of a few
positions at a time, and p is never renormalised over the drafter's (shorter) table: what the target
puts on rows that the drafter lacks is mass that no draft can meet.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from core_jax.ops.matmul import matmul

_TINY = 1e-9


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the terms; those of weight 0 are not computed.

    Attributes:
      ce: cross-entropy on the labels (the paper's).
      kl: KL(p || q), over the whole vocabulary, or over k tokens and the rest.
      tv: total variation, 1 - sum min(p, q): the rate of rejections.
      log_acceptance: -log sum min(p, q).
      teacher: where p comes from: "none", "target" (a pass of the frozen target in the step), or
        "stored" (top-k of the answer files).
      top_k: tokens of p that count one by one; the rest is one more outcome. 0: all ("target").
      temperature: p and q are compared at this temperature.
      logits_chunk: positions whose logits are held at once.
    """

    ce: float = 1.0
    kl: float = 0.0
    tv: float = 0.0
    log_acceptance: float = 0.0
    teacher: str = "none"
    top_k: int = 0
    temperature: float = 1.0
    logits_chunk: int = 128

    def __post_init__(self):
        if self.teacher not in ("none", "target", "stored"):
            raise ValueError(f"loss.teacher is {self.teacher!r}: 'none', 'target' or 'stored'")
        if min(self.ce, self.kl, self.tv, self.log_acceptance) < 0:
            raise ValueError("weights of loss terms must not be negative")
        if not self.ce and not self.needs_teacher:
            raise ValueError("all weights of the loss are 0")
        if self.needs_teacher != (self.teacher != "none"):
            raise ValueError(
                f"loss.teacher is {self.teacher!r}, but the terms "
                f"{'need' if self.needs_teacher else 'do not use'} the target's probabilities"
            )
        if self.teacher == "stored" and self.top_k < 1:
            raise ValueError("loss.teacher='stored' needs loss.top_k, as many as were stored")
        if self.teacher == "stored" and self.temperature != 1:
            raise ValueError("stored probabilities are those of temperature 1; set it to 1")
        if self.temperature <= 0:
            raise ValueError(f"loss.temperature is {self.temperature}; it must be positive")

    @property
    def needs_teacher(self) -> bool:
        """Whether p is needed."""
        return bool(self.kl or self.tv or self.log_acceptance)


def distribution_terms(
    log_p: Float[Array, "... V"], log_q: Float[Array, "... V"]
) -> dict[str, Float[Array, "..."]]:
    """Divergences of distributions over the same outcomes.

    Args:
      log_p: the target's log probabilities; they may sum to less than 1.
      log_q: the drafter's.

    Returns:
      `kl` = sum p (log p - log q), `overlap` = sum min(p, q), in nats and as a probability.
    """
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    # p log p is 0 where p is, and -inf * 0 must not appear.
    gap = jnp.where(p > 0, log_p - log_q, 0.0)
    return {"kl": jnp.sum(p * gap, axis=-1), "overlap": jnp.sum(jnp.minimum(p, q), axis=-1)}


def with_rest(
    log_probs: Float[Array, "... V"], ids: Int[Array, "... k"]
) -> Float[Array, "... k+1"]:
    """Log probabilities of some tokens, and of all others together."""
    picked = jnp.take_along_axis(log_probs, ids, axis=-1)
    return append_rest(picked)


def append_rest(picked: Float[Array, "... k"]) -> Float[Array, "... k+1"]:
    """Some tokens' log probabilities and the logarithm of what is left."""
    rest = jnp.log(jnp.maximum(1.0 - jnp.sum(jnp.exp(picked), axis=-1, keepdims=True), _TINY))
    return jnp.concatenate([picked, rest], axis=-1)


def match_vocabulary(log_p: Float[Array, "... W"], size: int) -> Float[Array, "... V"]:
    """The target's log probabilities of the drafter's `size` tokens, not renormalised."""
    have = log_p.shape[-1]
    if have >= size:
        return log_p[..., :size]
    room = [(0, 0)] * (log_p.ndim - 1) + [(0, size - have)]
    return jnp.pad(log_p, room, constant_values=-jnp.inf)


def token_losses(
    hidden: Float[Array, "B T D"],
    table: Float[Array, "V D"],
    labels: Int[Array, "B T"],
    config: LossConfig,
    teacher: Any = None,
) -> dict[str, Float[Array, "B T"]]:
    """Every term at every position; logits of `logits_chunk` positions exist at a time.

    Args:
      hidden: the drafter's states, each of which predicts its label.
      table: the drafter's head.
      labels: any valid id where the result is masked.
      config: which terms.
      teacher: None; (states [B, T, E], head [W, E]) of the target; or stored (ids [B, T, k],
        log probabilities [B, T, k]).

    Returns:
      `ce` and `correct`; with a teacher also `kl`, `overlap` and `agree` (same most likely token).
    """
    B, T, _ = hidden.shape
    chunk = min(config.logits_chunk, T)
    count = -(-T // chunk)

    def pieces(x):
        room = [(0, 0), (0, count * chunk - T)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, room).reshape(B, count, chunk, *x.shape[2:]).swapaxes(0, 1)

    stored = config.teacher == "stored"
    parts = () if teacher is None else (teacher if stored else (teacher[0],))
    head = None if teacher is None or stored else teacher[1]

    @jax.checkpoint
    def one(_, piece):
        h, label, *extra = piece
        log_q = jax.nn.log_softmax(matmul(h, table.T.astype(h.dtype)).astype(jnp.float32))
        ce = -jnp.take_along_axis(log_q, label[..., None], axis=-1)[..., 0]
        best = jnp.argmax(log_q, axis=-1)
        terms = {"ce": ce, "correct": (best == label).astype(jnp.float32)}
        if extra:
            terms |= _teacher_terms(extra, head, log_q, best, config)
        return None, terms

    _, out = jax.lax.scan(one, None, tuple(pieces(x) for x in (hidden, labels, *parts)))
    return {k: x.swapaxes(0, 1).reshape(B, count * chunk)[:, :T] for k, x in out.items()}


def _teacher_terms(extra, head, log_q, best, config: LossConfig) -> dict[str, Array]:
    if config.temperature != 1:
        log_q = jax.nn.log_softmax(log_q / config.temperature)
    if config.teacher == "stored":
        ids, log_p = extra
        first = jnp.take_along_axis(ids, jnp.argmax(log_p, axis=-1)[..., None], axis=-1)[..., 0]
        log_p, log_q = append_rest(log_p), with_rest(log_q, ids)
    else:
        states = jax.lax.stop_gradient(extra[0])
        logits = matmul(states, head.T.astype(states.dtype)).astype(jnp.float32)
        first = jnp.argmax(logits, axis=-1)
        log_p = jax.nn.log_softmax(logits / config.temperature)
        log_p = match_vocabulary(log_p, log_q.shape[-1])
        if config.top_k:
            picked, ids = jax.lax.top_k(log_p, config.top_k)
            log_p, log_q = append_rest(picked), with_rest(log_q, ids)
    terms = distribution_terms(jax.lax.stop_gradient(log_p), log_q)
    return {**terms, "agree": (first == best).astype(jnp.float32)}


def combine(
    terms: dict[str, Float[Array, "B T"]], mask: Bool[Array, "B T"], config: LossConfig
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss, a mean over the supervised tokens, and metrics with their number as `weight`."""
    weights = mask.astype(jnp.float32)
    total = jnp.sum(weights)

    def mean(x):
        return jnp.sum(jnp.where(mask, x, 0.0)) / jnp.maximum(total, 1.0)

    metrics = {"weight": total, "ce": mean(terms["ce"]), "token_accuracy": mean(terms["correct"])}
    loss = config.ce * metrics["ce"]
    if "kl" in terms:
        overlap = terms["overlap"]
        metrics |= {
            "kl": mean(terms["kl"]), "acceptance": mean(overlap), "agreement": mean(terms["agree"])
        }  # fmt: skip
        loss += config.kl * metrics["kl"] + config.tv * (1.0 - metrics["acceptance"])
        loss += config.log_acceptance * mean(-jnp.log(jnp.maximum(overlap, _TINY)))
    return loss, metrics
