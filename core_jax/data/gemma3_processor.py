"""Gemma 3's preprocessing: messages and images to arrays of fixed shape.

Text goes through the checkpoint's own tokenizer and chat template. Numpy, on the host. Crops
("pan and scan") are off, as they are in released checkpoints.
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

from core_jax.data.processors import ImageProcessor, ProcessorError
from core_jax.data.prompts import (
    check_tokens,
    pad_prompts,
    read_chat_template,
    read_image_processor_config,
)
from core_jax.models.gemma3 import Gemma3Config, ImagePromptError, check_placeholders

_CROPS = ("do_pan_and_scan", "pan_and_scan_min_crop_size", "pan_and_scan_max_num_crops",
          "pan_and_scan_min_ratio_to_activate")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Gemma3Inputs:
    """Prompts and their images, ready for the model.

    Attributes:
      ids: int32 [B, P].
      valid: bool [B, P], False at padding.
      pixel_values: float32 [B, I, h, w, 3]; rows with fewer than I images end in black ones. None
        without any.
      num_images: int32 [B].
    """

    ids: np.ndarray
    valid: np.ndarray
    pixel_values: np.ndarray | None
    num_images: np.ndarray


@dataclasses.dataclass(frozen=True)
class Gemma3Processor:
    """Messages or text, and images, to arrays.

    Attributes:
      tokenizer: transformers' tokenizer.
      image_processor: of the checkpoint; see `gemma3_image_processor`.
      config: of the model.
      chat_template: the checkpoint's; the tokenizer's own if None.
    """

    tokenizer: Any
    image_processor: ImageProcessor
    config: Gemma3Config
    chat_template: str | None = None

    def __post_init__(self):
        c = self.config
        side = c.vision_config.image_size
        if self.image_processor.size != (side, side):
            raise ProcessorError(
                f"the image processor makes images of {self.image_processor.size}, the vision "
                f"tower takes {side} x {side}; is preprocessor_config.json of another model?"
            )
        for name, wanted in (("boi_token", c.boi_token_index), ("eoi_token", c.eoi_token_index),
                             ("image_token", c.image_token_index)):  # fmt: skip
            token = getattr(self.tokenizer, name, None)
            if token is None:
                raise ProcessorError(
                    f"the tokenizer has no {name}; copy tokenizer_config.json from a multimodal "
                    "Gemma 3 (that of the text-only 1B lacks it)"
                )
            found = self.tokenizer.convert_tokens_to_ids(token)
            if found != wanted:
                raise ProcessorError(
                    f"the tokenizer's {name} {token} is {found}, the model's is {wanted}; is the "
                    "tokenizer of another model?"
                )

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike, config: Gemma3Config | None = None
    ) -> Gemma3Processor:
        """Reads tokenizer, image processor and chat template of a hub directory.

        Raises:
          FileNotFoundError: there is no preprocessor_config.json or processor_config.json.
          ProcessorError: the parts are not of one model, or images are to be cropped.
        """
        from transformers import AutoTokenizer

        path = pathlib.Path(path)
        if config is None:
            config = Gemma3Config.from_hf(json.loads((path / "config.json").read_text()))
        tokenizer = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
        images = gemma3_image_processor(read_image_processor_config(path))
        return cls(tokenizer, images, config, read_chat_template(path))

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> str:
        """One conversation as text, with one begin-of-image token for each image.

        Args:
          messages: {"role", "content"}; content is text or a list of {"type": "image"} and
            {"type": "text", "text": ...}.
          add_generation_prompt: end with the start of the model's turn.
        """
        return self.tokenizer.apply_chat_template(
            list(messages), chat_template=self.chat_template, tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )  # fmt: skip

    def expand(self, text: str, num_images: int, *, where: str = "the prompt") -> str:
        """Puts an image's placeholders and its end behind each begin-of-image token.

        Raises:
          ImagePromptError: not one begin-of-image token for each image.
        """
        t = self.tokenizer
        if text.count(t.boi_token) != num_images:
            raise ImagePromptError(
                f"{where} has {text.count(t.boi_token)} places for images ({t.boi_token}), and "
                f"{num_images} images were given"
            )
        tokens = t.image_token * self.config.mm_tokens_per_image
        return text.replace(t.boi_token, f"\n\n{t.boi_token}{tokens}{t.eoi_token}\n\n")

    def tokens(self, text: str, num_images: int, *, where: str = "the prompt") -> list[int]:
        """Ids of one prompt; a begin-of-sequence token is added unless the text has it.

        Raises:
          ImagePromptError: see `expand`.
        """
        text = self.expand(text, num_images, where=where)
        bos = self.tokenizer.bos_token
        rendered = bos is not None and text.startswith(bos)
        return self.tokenizer(text, add_special_tokens=not rendered)["input_ids"]

    def __call__(
        self,
        texts: Sequence[str],
        images: Sequence[Sequence[Image.Image | np.ndarray]] | None = None,
        *,
        length: int | None = None,
        padding_side: str = "left",
        max_images: int | None = None,
    ) -> Gemma3Inputs:
        """Tokens and pixels of a batch.

        Args:
          texts: one a row, as `render` gives them.
          images: for each row its images in order; None for text alone.
          length: P, for a fixed shape; the longest row by default.
          padding_side: "left" to generate, "right" to train.
          max_images: I, for a fixed shape; the most of any row by default.

        Raises:
          ImagePromptError: images and their places do not match.
          ValueError: a row has no token, is longer than `length` or has more than `max_images`, or
            an image cannot be read.
        """
        images = [()] * len(texts) if images is None else images
        if len(images) != len(texts):
            raise ImagePromptError(f"{len(texts)} prompts, but images for {len(images)}")
        counts = np.array([len(row) for row in images], np.int32)
        rows = [
            self.tokens(text, int(count), where=f"row {i}")
            for i, (text, count) in enumerate(zip(texts, counts, strict=True))
        ]
        check_tokens(rows)
        ids, valid = pad_prompts(
            rows, pad_id=self.tokenizer.pad_token_id, length=length, side=padding_side
        )
        # A text that spells the placeholder itself is found here.
        check_placeholders(np.where(valid, ids, -1), counts, self.config)
        return Gemma3Inputs(ids, valid, self._pixels(images, counts, max_images), counts)

    def _pixels(self, images, counts, max_images):
        most = int(counts.max(initial=0))
        slots = most if max_images is None else max_images
        if most > slots:
            raise ValueError(f"a row has {most} images, more than max_images {max_images}")
        if not slots:
            return None
        side = self.config.vision_config.image_size
        pixels = np.zeros((len(counts), slots, side, side, 3), np.float32)
        for i, row in enumerate(images):
            if len(row):
                pixels[i, : len(row)] = self.image_processor(row)
        return pixels


def gemma3_image_processor(config: Mapping[str, Any]) -> ImageProcessor:
    """From the contents of a preprocessor_config.json.

    Raises:
      ProcessorError: images are to be cropped, or see `ImageProcessor.from_hf`.
    """
    if config.get("do_pan_and_scan"):
        raise ProcessorError(
            "preprocessor_config.json asks for do_pan_and_scan, which is not supported; set it to "
            "false (released checkpoints leave it off)"
        )
    return ImageProcessor.from_hf({k: v for k, v in config.items() if k not in _CROPS})
