"""Qwen2.5-VL's preprocessing: messages and images to arrays of fixed shape.

Text goes through the checkpoint's own tokenizer and chat template. Numpy, on the host.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from core_jax.data.processors import ProcessorError
from core_jax.data.prompts import (
    check_tokens,
    pad_prompts,
    read_chat_template,
    read_image_processor_config,
)
from core_jax.data.qwen2_5_vl_images import Qwen2_5_VLImageProcessor
from core_jax.models.qwen2_5_vl import (
    ImagePromptError,
    PackedImages,
    PromptPlaces,
    Qwen2_5_VLConfig,
    pack_images,
    place_prompts,
)
from core_jax.models.qwen2_5_vl.packing import Grid, num_image_tokens

IMAGE_PAD = "<|image_pad|>"


@dataclasses.dataclass(frozen=True)
class ImageTextInputs:
    """Prompts and their images, ready for the model.

    Attributes:
      ids: int32 [B, P].
      valid: bool [B, P], False at padding.
      places: positions, and which token is which image token.
      images: packed images; None without any.
    """

    ids: np.ndarray
    valid: np.ndarray
    places: PromptPlaces
    images: PackedImages | None


@dataclasses.dataclass(frozen=True)
class Qwen2_5_VLProcessor:
    """Messages or text, and images, to arrays.

    Attributes:
      tokenizer: transformers' tokenizer.
      image_processor: of the checkpoint.
      config: of the model.
      chat_template: the checkpoint's; the tokenizer's own if None.
    """

    tokenizer: Any
    image_processor: Qwen2_5_VLImageProcessor
    config: Qwen2_5_VLConfig
    chat_template: str | None = None

    def __post_init__(self):
        ours, tower = self.image_processor, self.config.vision_config
        mine = (ours.patch_size, ours.merge_size, ours.temporal_patch_size)
        its = (tower.patch_size, tower.spatial_merge_size, tower.temporal_patch_size)
        if mine != its:
            raise ProcessorError(
                f"patches of the image processor (size, merge, frames) {mine} are not those of "
                f"the vision tower {its}; is preprocessor_config.json of another model?"
            )
        found = self.tokenizer.convert_tokens_to_ids(IMAGE_PAD)
        if found != self.config.image_token_id:
            raise ProcessorError(
                f"the tokenizer's {IMAGE_PAD} is {found}, the model's image_token_id is "
                f"{self.config.image_token_id}; is the tokenizer of another model?"
            )

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike, config: Qwen2_5_VLConfig | None = None
    ) -> Qwen2_5_VLProcessor:
        """Reads tokenizer, image processor and chat template of a hub directory.

        Raises:
          FileNotFoundError: there is no preprocessor_config.json or processor_config.json.
          ProcessorError: see the constructors.
        """
        from transformers import AutoTokenizer

        path = pathlib.Path(path)
        if config is None:
            config = Qwen2_5_VLConfig.from_hf(json.loads((path / "config.json").read_text()))
        tokenizer = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
        images = Qwen2_5_VLImageProcessor.from_hf(read_image_processor_config(path))
        return cls(tokenizer, images, config, read_chat_template(path))

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> str:
        """One conversation as text, with one `<|image_pad|>` for each image.

        Args:
          messages: {"role", "content"}; content is text or a list of {"type": "image"} and
            {"type": "text", "text": ...}.
          add_generation_prompt: end with the start of the assistant's turn.
        """
        return self.tokenizer.apply_chat_template(
            list(messages), chat_template=self.chat_template, tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )  # fmt: skip

    def expand(self, text: str, grids: Sequence[Grid], *, where: str = "the prompt") -> str:
        """Repeats each `<|image_pad|>` for its image's tokens.

        Raises:
          ImagePromptError: not one image for each.
        """
        parts = text.split(IMAGE_PAD)
        if len(parts) - 1 != len(grids):
            raise ImagePromptError(
                f"{where} has {len(parts) - 1} places for images ({IMAGE_PAD}), and "
                f"{len(grids)} images were given"
            )
        counts = [num_image_tokens(grid, self.config.vision_config) for grid in grids]
        runs = [IMAGE_PAD * count for count in counts]
        return "".join(p + r for p, r in zip(parts, [*runs, ""], strict=True))

    def __call__(
        self,
        texts: Sequence[str],
        images: Sequence[Sequence[Image.Image | np.ndarray]] | None = None,
        *,
        length: int | None = None,
        padding_side: str = "left",
        rows: int | None = None,
        windows: int | None = None,
    ) -> ImageTextInputs:
        """Tokens, positions and patches of a batch.

        Args:
          texts: one a row, as `render` gives them.
          images: for each row its images in order; None for text alone.
          length: P, for a fixed shape; the longest row by default.
          padding_side: "left" to generate, "right" to train.
          rows: see `pack_images`.
          windows: see `pack_images`.

        Raises:
          ImagePromptError: images and their places do not match.
          ValueError: a row has no token or is longer than `length`, or an image cannot be read.
        """
        images = [()] * len(texts) if images is None else images
        if len(images) != len(texts):
            raise ImagePromptError(f"{len(texts)} prompts, but images for {len(images)}")
        cut = [[self.image_processor(image) for image in row] for row in images]
        flat = [image for row in cut for image in row]
        packed = None
        if flat:
            patches, grids = zip(*flat, strict=True)
            packed = pack_images(
                patches, grids, self.config.vision_config, rows=rows, windows=windows
            )
        tokens = [
            self.tokenizer(self.expand(text, [g for _, g in row], where=f"row {i}"))["input_ids"]
            for i, (text, row) in enumerate(zip(texts, cut, strict=True))
        ]
        check_tokens(tokens)
        ids, valid = pad_prompts(
            tokens, pad_id=self.tokenizer.pad_token_id, length=length, side=padding_side,
            remedy="raise the length, or lower max_pixels",
        )  # fmt: skip
        return ImageTextInputs(ids, valid, place_prompts(ids, valid, packed, self.config), packed)
