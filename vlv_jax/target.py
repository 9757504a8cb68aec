"""The captioner as a target of speculative decoding (core_jax.decode.target).

The 77 projected states of an image stand where other models have image tokens; the prompt after
them is empty as a rule. A drafter shares the states before projection, T(z).
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float, UInt8

from core_jax.data.images import ImageLimits
from core_jax.data.prompts import pad_prompts
from core_jax.decode.frontends import allowed_length, open_image, padding_id
from core_jax.decode.prefix import PrefixDecoder, PrefixPrompt
from core_jax.decode.target import Prompt, Target, TargetError, TargetInputs
from core_jax.ops.execution import Execution
from core_jax.partition import cast_floating
from vlv_jax.batches import ImageViews
from vlv_jax.encoding import caption_embeddings, context_of, image_features
from vlv_jax.inference import Captioner
from vlv_jax.networks import Networks

MODEL_TYPE = "vlv"


@dataclasses.dataclass(frozen=True)
class CaptionerDecoder(PrefixDecoder):
    """A `WindowDecoder` whose parameters are those of `Networks`.

    Attributes:
      networks: with the language model.
    """

    networks: Networks

    def encode_images(self, params: Any, images: UInt8[Array, "B H W 3"]) -> Float[Array, "B Q E"]:
        """T(z) of Florence-2 views."""
        z = caption_embeddings(self.networks, params, image_features(self.networks, params, images))
        return context_of(self.networks, params, z)


@dataclasses.dataclass(frozen=True)
class CaptionerFrontend:
    """Images, and a text that captions go on from; see `Frontend`.

    Attributes:
      tokenizer: of the language model.
      views: how an image becomes Florence-2's view.
      limits: what an acceptable image is.
    """

    tokenizer: Any
    views: ImageViews
    limits: ImageLimits = ImageLimits()
    image_ids: tuple[int, ...] = ()

    def render(self, prompt: Prompt, num_images: int) -> str:
        """The text itself, the start of the caption; as a rule there is none.

        Raises:
          ValueError: messages, or not one image at most.
        """
        if not isinstance(prompt, str):
            raise ValueError("the captioner takes no messages; give '', or a caption's first words")
        if num_images > 1:
            raise ValueError(f"the captioner looks at one image, and {num_images} were given")
        return prompt

    def prepare(
        self,
        texts: Sequence[str],
        images: Sequence[Sequence[Any]],
        *,
        lengths: Sequence[int] | None = None,
    ) -> TargetInputs:
        """See `Frontend`. Rows without an image need a text."""
        for row, (text, given) in enumerate(zip(texts, images, strict=True)):
            if len(given) > 1:
                raise ValueError(f"row {row} has {len(given)} images; the captioner looks at one")
            if not given and not text:
                raise ValueError(f"row {row} has neither an image nor a text to go on from")
        rows = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        longest = max(map(len, rows))
        length = allowed_length(longest, lengths) if longest else 0
        ids, valid = pad_prompts(
            rows, pad_id=self.tokenizer.pad_token_id, length=length, side="left"
        )
        has_image = np.array([len(given) > 0 for given in images])
        prompt = PrefixPrompt(ids, valid, has_image)  # type: ignore[arg-type]
        return TargetInputs(prompt, self._views(images), ids, valid)

    def _views(self, images: Sequence[Sequence[Any]]) -> np.ndarray | None:
        views = [
            self.views(open_image(row[0], self.limits))["florence_image"] if len(row) else None
            for row in images
        ]
        some = next((view for view in views if view is not None), None)
        if some is None:
            return None
        return np.stack([np.zeros_like(some) if view is None else view for view in views])


def target_of(captioner: Captioner) -> Target:
    """A loaded captioner as a target; decoded greedily it says what `caption` does."""
    networks, tokenizer = captioner.networks, captioner.pieces.lm_tokenizer
    views = captioner.views
    if views.crop == "random":  # of training
        views = dataclasses.replace(views, crop="center")
    assert networks.projector is not None
    assert networks.language_model is not None
    config = networks.language_model.config
    return Target(
        model_type=MODEL_TYPE,
        decoder=CaptionerDecoder(networks.projector, networks.language_model, networks),
        params=captioner.params,
        frontend=CaptionerFrontend(tokenizer, views, captioner.limits),
        vocab_size=config.vocab_size,
        # The prefix takes positions of its own.
        max_positions=config.max_position_embeddings - networks.bridge.num_queries,
        eos_ids=(tokenizer.eos_token_id,),
        pad_id=padding_id(tokenizer, (tokenizer.eos_token_id,)),
    )


def load(
    path: str | os.PathLike,
    *,
    dtype: Any = None,
    mesh: Any = None,
    rules: Any = None,
    execution: Execution | None = None,
) -> Target:
    """The captioner of a stage-2 run or of its export; the entry point of `core_jax.targets`.

    Args:
      path: the directory.
      dtype: floating-point type of the parameters; what the directory says if None.
      mesh: where parameters are placed, sharded by size.
      rules: must be None.
      execution: of the language model.

    Raises:
      TargetError: `rules` were given.
      WorkdirError: the directory is no captioner.
    """
    if rules is not None:
        raise TargetError("VLV's networks are sharded by size over `mesh`; leave `rules` out")
    captioner = Captioner.from_pretrained(pathlib.Path(path), mesh=mesh)
    if execution is not None and (lm := captioner.networks.language_model) is not None:
        captioner.networks = dataclasses.replace(
            captioner.networks, language_model=lm.clone(execution=execution)
        )
    if dtype is not None:
        captioner.params = cast_floating(captioner.params, dtype)
    return target_of(captioner)
