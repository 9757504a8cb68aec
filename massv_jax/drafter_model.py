"""The drafter's language model and projector as one network, as decoders use them.

Its methods are those of the target's own network, so the same decoder (core_jax.decode) runs both;
only the tower is missing. Parameters are {"projector", "language_model"}, and "target_merger" for
drafters that read the target's merged tokens.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from core_jax.models.gemma3 import Gemma3ForConditionalGeneration
from core_jax.models.gemma3_text import Gemma3ForCausalLM, Gemma3TextConfig
from core_jax.models.qwen2 import Qwen2ForCausalLM
from core_jax.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from core_jax.models.qwen2_5_vl.model import Qwen2_5_VLText
from core_jax.models.qwen2_5_vl.vision import PatchMerger
from core_jax.ops.execution import Execution
from massv_jax.drafter_config import DrafterConfig
from massv_jax.projector import make_projector


def within_vocabulary(ids: Int[Array, "B T"], vocab_size: int) -> Int[Array, "B T"]:
    """Ids that the drafter's table has; others (the target's padding, placeholders) become 0.

    Released tables of one family are padded differently (151936 and 152064 rows; 262144 and
    262208), and a lookup past the end gives NaN, which a cache would keep.
    """
    return jnp.where(ids < vocab_size, ids, 0)


class QwenDrafterModel(Qwen2_5_VLForConditionalGeneration):
    """A Qwen2.5-VL with another projector and without a tower ("merger", "mlp")."""

    config: Any  # DrafterConfig

    def setup(self):
        """Projector and language model."""
        c = self.config
        self.projector: Any = make_projector(c)
        self.language_model = Qwen2_5_VLText(c.text, self.execution)
        if c.kind == "mlp":
            vision = c.target.vision_config
            self.target_merger = PatchMerger(vision.out_hidden_size, vision.merge_unit)

    def merge_vision(self, states: Float[Array, "R S Dv"]) -> Float[Array, "R U D"]:
        """Packed image tokens from the shared tower's patches."""
        if self.config.kind == "mlp":
            states = self.target_merger(states)
        return self.projector(states)

    def embed(self, ids, image_slots=None):
        """Token embeddings; ids outside the table get token 0's."""
        ids = within_vocabulary(ids, self.config.vocab_size)
        return super().embed(ids, image_slots)


class Gemma3DrafterModel(Gemma3ForConditionalGeneration):
    """A Gemma 3 with another projector and without a tower ("gemma").

    Attributes:
      drafter: the whole drafter's configuration; `config` is its `whole`.
    """

    drafter: Any = None  # DrafterConfig; a field after fields with defaults needs one

    def setup(self):
        """Projector and language model."""
        self.projector: Any = make_projector(self.drafter)
        self.language_model = Gemma3ForCausalLM(self.config.text_config, self.execution)

    def project_features(self, features: Float[Array, "M h w E"]) -> Float[Array, "M P D"]:
        """Image tokens of the shared tower's grid."""
        return self.projector(features)

    def embed(self, ids):
        """Scaled token embeddings; ids outside the table get token 0's."""
        return super().embed(within_vocabulary(ids, self.config.text_config.vocab_size))


class Qwen2DrafterModel(Qwen2ForCausalLM):
    """A Qwen2 that reads any id of the target ("prefix", "text")."""

    def embed(self, ids):
        """Token embeddings; ids outside the table get token 0's."""
        return super().embed(within_vocabulary(ids, self.config.vocab_size))


class Gemma3TextDrafterModel(Gemma3ForCausalLM):
    """A text-only Gemma 3 that reads any id of the target ("text")."""

    def embed(self, ids):
        """Scaled token embeddings; ids outside the table get token 0's."""
        return super().embed(within_vocabulary(ids, self.config.vocab_size))


def make_model(config: DrafterConfig, execution: Execution) -> nn.Module:
    """The network of a drafter's kind; of "prefix" and "text" the language model alone."""
    if config.kind in ("merger", "mlp"):
        return QwenDrafterModel(config=config, execution=execution)
    if config.kind == "gemma":
        return Gemma3DrafterModel(config=config.whole, execution=execution, drafter=config)
    if isinstance(config.text, Gemma3TextConfig):
        return Gemma3TextDrafterModel(config=config.text, execution=execution)
    return Qwen2DrafterModel(config=config.text, execution=execution)
