"""Stage 2: a language model reads the caption embeddings out.

arXiv 2507.07104, section 3.3 and equation 2. Released code: models/VLV_stage2.py.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from core_jax.ops.losses import chunked_token_cross_entropy, masked_mean
from core_jax.partition import merge
from vlv_jax.encoding import caption_embeddings, context_of
from vlv_jax.networks import LANGUAGE_MODEL, PROJECTOR, Networks
from vlv_jax.stage1 import DenoisingConfig, batch_features, batch_latents, denoising_losses

# Section 5.2 of the specification; what each row of the paper's table 4b trains.
TRAINABLE_MLP = (r"projector/.*",)
TRAINABLE_LLM = (*TRAINABLE_MLP, r"language_model/.*")
TRAINABLE = (*TRAINABLE_LLM, r"florence2/language_model/(encoder|decoder)/.*")
_REDRAWN = ("index", "image", "latent_mean", "latent_logvar")  # of a batch, for stage 1's loss
# Without stage 1 the queries and phi must learn here, or they stay random.
TRAINABLE_WITHOUT_STAGE1 = (*TRAINABLE, r"bridge/.*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptioningConfig:
    """The captioning objective.

    Attributes:
      reconstruction_weight: weight of stage 1's loss beside the captioning loss. The paper has
        0, after which captioning destroys redrawing; see docs/deviations.md.
      reconstruction_every: which images that loss looks at: the first of every so many of a
        batch. The UNet is dear, and some of the images are enough to hold on to redrawing.
      supervise_eos: whether the end of a caption is learned. The released code does not.
      logits_chunk: caption positions whose logits are held at once; [B, 300, V] in float32 would
        be most of a device's memory.
    """

    reconstruction_weight: float = 0.0
    reconstruction_every: int = 1
    supervise_eos: bool = True
    logits_chunk: int = 64

    def __post_init__(self):
        if self.reconstruction_weight < 0:
            raise ValueError("captioning.reconstruction_weight must not be negative")
        if self.reconstruction_every < 1:
            raise ValueError("captioning.reconstruction_every must be at least 1")


def prefix_embeddings(
    networks: Networks, params: Mapping[str, Any], context: Float[Array, "B Q E"]
) -> Float[Array, "B Q D"]:
    """E = psi(c), the language model's whole prompt."""
    return networks.projector.apply({"params": params[PROJECTOR]}, context)


def caption_losses(
    networks: Networks,
    params: Mapping[str, Any],
    prefix: Float[Array, "B Q D"],
    tokens: Int[Array, "B T"],
    chunk: int,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Each caption token's loss given the prefix and the tokens before it, and whether it was
    the most likely one. Logits are never held for more than `chunk` positions.
    """  # noqa: D205
    lm, weights = networks.language_model, {"params": params[LANGUAGE_MODEL]}
    embeds = lm.apply(weights, tokens[:, :-1], method="embed")
    embeds = jnp.concatenate([prefix.astype(embeds.dtype), embeds], axis=1)
    hidden, _ = lm.apply(weights, embeds, method="from_embeddings")
    # The last prefix position predicts the first token; earlier ones predict nothing.
    hidden = hidden[:, prefix.shape[1] - 1 :]
    table = lm.apply(weights, method="head_table")
    return chunked_token_cross_entropy(hidden, table, tokens, chunk=chunk)


def caption_loss(
    losses: Float[Array, "B T"], correct: Bool[Array, "B T"], supervised: Bool[Array, "B T"]
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean cross-entropy over supervised tokens, in nats, with their number as the weight."""
    accuracy = masked_mean(correct.astype(jnp.float32), supervised)
    weight = jnp.sum(supervised.astype(jnp.float32))
    return masked_mean(losses, supervised), {"weight": weight, "token_accuracy": accuracy}


def one_of_every(n: int, x: Array) -> Array:
    """The first of every `n` rows: `[B, ...] -> [B/n, ...]`, each from the device that has it."""
    return x.reshape(x.shape[0] // n, n, *x.shape[1:])[:, 0]


def make_loss(networks: Networks, config: CaptioningConfig, denoising: DenoisingConfig) -> Callable:
    """The stage-2 loss `(trainable, frozen, batch, key) -> (loss, metrics)`.

    The batch has `tokens` int32 [B, T] (caption, end of text, padding), `supervised` bool [B, T]
    (False on padding), and what stage 1's batch has; `image` or the cached moments only where
    `reconstruction_weight` is not 0.
    """

    def loss(trainable, frozen, batch, key):
        params = merge(trainable, frozen)
        z = caption_embeddings(networks, params, batch_features(networks, params, batch))
        context = context_of(networks, params, z)
        prefix = prefix_embeddings(networks, params, context)
        losses, correct = caption_losses(
            networks, params, prefix, batch["tokens"], config.logits_chunk
        )
        value, metrics = caption_loss(losses, correct, batch["supervised"])
        if config.reconstruction_weight:
            some = functools.partial(one_of_every, config.reconstruction_every)
            images = {name: some(batch[name]) for name in _REDRAWN if name in batch}
            latents, draws = batch_latents(networks, params, images, key, denoising)
            redraw = jnp.mean(
                denoising_losses(networks, params, latents, some(context), draws, denoising)
            )
            metrics |= {"caption_loss": value, "denoising_loss": redraw}
            value = value + config.reconstruction_weight * redraw
        return value, metrics

    return loss
