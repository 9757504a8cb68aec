"""Phase 2 (SDViT): projector and language model learn to answer as the target does.

Cross-entropy on answers that the target itself wrote (arXiv 2505.10526); with other weights
(massv_jax.losses) the target's whole distribution is learned, from a pass of the frozen target in
the step or from stored probabilities. The same loss, on captions, is phase 1's.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from core_jax.models.gemma3 import Gemma3Config, Gemma3ForConditionalGeneration
from core_jax.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from core_jax.ops.attention import whole_sequence_mask
from core_jax.ops.execution import Execution
from core_jax.partition import merge
from massv_jax.drafter import Drafter, insert_tokens
from massv_jax.losses import LossConfig, combine, token_losses

TRAINABLE = (r"projector/.*", r"language_model/.*")
TRAINABLE_TEXT = (r"language_model/.*",)
TOWER, TARGET = "tower", "target"
Batch = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Teacher:
    """The target in the step: its final states at every position, without gradients.

    Its parameters are {"language_model"} and its projector ("merger" or "multi_modal_projector");
    the tower is the drafter's.

    Attributes:
      config: the target's.
      execution: backends.
    """

    config: Any
    execution: Execution = Execution()

    def hidden(
        self, params: Any, batch: Batch, features: Float[Array, "..."] | None
    ) -> Float[Array, "B T D"]:
        """States of the target's own prompt, which the batch names `target_*` where it differs."""

        def own(name: str) -> Array:
            named = f"target_{name}"
            return batch[named if named in batch else name]

        ids = own("tokens")
        if isinstance(self.config, Gemma3Config):
            model = Gemma3ForConditionalGeneration(self.config, self.execution)
            found: Any = _gemma_hidden(model, params, ids, own("valid"), features)
            return jax.lax.stop_gradient(found)
        model = Qwen2_5_VLForConditionalGeneration(self.config, self.execution)
        weights = {"params": {"language_model": params["language_model"],
                              "visual": {"merger": params["merger"]}}}  # fmt: skip

        def call(method: str, *args: Any) -> Any:
            return model.apply(weights, *args, method=method)

        slots = own("slots")
        embeds: Any = call("embed", ids, slots)
        if features is not None:
            embeds = insert_tokens(embeds, slots, call("merge_vision", features))
        # Padding follows a row's tokens (massv_jax.batches): none of them sees it.
        mask = whole_sequence_mask(ids.shape[1], self.execution.attention)
        positions = jnp.moveaxis(own("positions"), 1, 0)
        return jax.lax.stop_gradient(call("hidden_states", embeds, positions, mask)[0])

    def head(self, params: Any) -> Float[Array, "V D"]:
        """The target's output head."""
        tied = self.config.text_config.tie_word_embeddings
        return params["language_model"]["embed_tokens" if tied else "lm_head"]["embedding"]


def _gemma_hidden(model, params, ids, valid, features):
    weights = {"params": params}

    def call(method: str, *args: Any) -> Any:
        return model.apply(weights, *args, method=method)

    tokens = blocks = None
    if features is not None:
        tokens = call("project_features", features)
        tokens = tokens.reshape(ids.shape[0], -1, tokens.shape[-1])
        blocks = call("image_blocks", ids)
    return call("from_embeddings", call("embed_prompt", ids, tokens), valid, blocks)[0]


def batch_features(drafter: Drafter, tower: Any, batch: Batch, encode: Any = None) -> Any:
    """What the frozen tower says of a batch's images; None without images.

    Args:
      drafter: whose tower it is.
      tower: its parameters.
      batch: see massv_jax.batches.
      encode: (parameters, images) -> features, of a target with a tower of its own ("prefix").
    """
    if "patches" in batch:
        patches = repeat_frames(batch["patches"], drafter.config.target.vision_config)
        args = (patches, batch["patch_positions"], batch["segments"])
        return _as_seeing(drafter).features(tower, *args)
    if "pixels" in batch:
        pixels = batch["pixels"]
        flat = pixels.reshape(-1, *pixels.shape[2:])
        return _as_seeing(drafter).features(tower, flat)
    if "images" in batch:
        return jax.lax.stop_gradient(encode(tower, batch["images"]))
    return None


def repeat_frames(patches: Float[Array, "B S c"], vision: Any) -> Float[Array, "B S C"]:
    """Patches of still images as the tower takes them, from one frame (massv_jax.batches)."""
    B, S, _ = patches.shape
    one = patches.reshape(B, S, vision.in_channels, 1, -1)
    shape = (B, S, vision.in_channels, vision.temporal_patch_size, one.shape[-1])
    return jnp.broadcast_to(one, shape).reshape(B, S, -1)


def _as_seeing(drafter: Drafter) -> Drafter:
    """For the tower alone: a text drafter's target has one, too."""
    if drafter.sees_images:
        return drafter
    from massv_jax.drafter_config import kinds_for

    kind = kinds_for(drafter.config.target)[0]
    return dataclasses.replace(drafter, config=_TowerOnly(kind, drafter.config.target))


@dataclasses.dataclass(frozen=True)
class _TowerOnly:
    """As much of a `DrafterConfig` as `Drafter.features` reads."""

    kind: str
    target: Any


def drafter_hidden(
    drafter: Drafter, params: Any, batch: Batch, features: Any
) -> Float[Array, "B T D"]:
    """The drafter's final states of a batch, whose rows are padded on the right."""
    if features is None or not drafter.sees_images:
        return drafter.hidden(params, batch["tokens"])
    tokens = drafter.image_tokens(params, features, batch.get("leaders"))
    if drafter.config.kind == "gemma":
        tokens = tokens.reshape(batch["tokens"].shape[0], -1, tokens.shape[-1])
    positions = batch.get("positions")
    positions = None if positions is None else jnp.moveaxis(positions, 1, 0)
    return drafter.hidden(params, batch["tokens"], None, tokens, batch.get("slots"), positions)


def make_loss(
    drafter: Drafter, config: LossConfig, *, teacher: Teacher | None = None, encode: Any = None
) -> Callable:
    """The loss `(trainable, frozen, batch, key) -> (loss, metrics)` of both phases.

    Frozen parameters are {"tower": ..., "target": the teacher's} and whatever of the drafter is
    not trained.

    Args:
      drafter: what learns.
      config: the terms.
      teacher: for `config.teacher == "target"`.
      encode: see `batch_features`.
    """

    def loss(trainable, frozen, batch, key):
        del key  # nothing is drawn
        tower = frozen.get(TOWER, {})
        own = {k: v for k, v in frozen.items() if k not in (TOWER, TARGET)}
        params = merge(trainable, own)
        params.setdefault("projector", {})
        features = batch_features(drafter, tower, batch, encode)
        hidden = drafter_hidden(drafter, params, batch, features)[:, :-1]
        known = None
        if config.teacher == "target":
            assert teacher is not None
            states = teacher.hidden(frozen[TARGET], batch, features)
            known = (_aligned(states, batch), teacher.head(frozen[TARGET]))
        elif config.teacher == "stored":
            known = (batch["top_ids"][:, 1:], batch["top_logprobs"][:, 1:])
        terms = token_losses(
            hidden, drafter.head_table(params), batch["tokens"][:, 1:], config, known
        )
        return combine(terms, batch["supervised"][:, 1:] & batch["valid"][:, 1:], config)

    return loss


def _aligned(states: Float[Array, "B P D"], batch: Batch) -> Float[Array, "B T D"]:
    """The target's states that predict the drafter's tokens 1, 2, ...

    A drafter with a prompt of its own has its token t at the target's place `source[t]`, which the
    place before it predicts.
    """
    if "source" not in batch:
        return states[:, :-1]
    before = jnp.maximum(batch["source"][:, 1:] - 1, 0)
    return jnp.take_along_axis(states, before[:, :, None], axis=1)
