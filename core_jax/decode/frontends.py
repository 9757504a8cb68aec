"""Preprocessing of our own targets: text and images to arrays of few fixed shapes (host)."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from core_jax.data.gemma3_processor import Gemma3Processor
from core_jax.data.images import ANY_SIZE, ImageLimits, decode_image, upright_rgb
from core_jax.data.prompts import check_tokens, pad_prompts
from core_jax.data.qwen2_5_vl_processor import Qwen2_5_VLProcessor
from core_jax.decode.gemma3 import Gemma3Prompt
from core_jax.decode.qwen2_5_vl import ImagePrompt
from core_jax.decode.target import Message, Prompt, TargetInputs
from core_jax.models.qwen2_5_vl import PromptPlaces

Images = Sequence[Sequence[Any]]


def open_image(image: Any, limits: ImageLimits | None = None) -> Image.Image:
    """RGB from a Pillow image, a uint8 array [H, W, 3], a path or encoded bytes.

    Args:
      image: what is in memory has the fate that its file would have.
      limits: what is accepted. None: the default limits for files and bytes, and any size for what
        is in memory, as someone has opened that under limits of their own.

    Raises:
      BadImage: it cannot be used.
      ValueError: another kind of array.
    """
    if isinstance(image, Image.Image):
        return upright_rgb(image, limits or ANY_SIZE)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise ValueError(f"arrays must be uint8 [H, W, 3], not {image.dtype} {image.shape}")
        return upright_rgb(Image.fromarray(image), limits or ANY_SIZE)
    return decode_image(image, limits)


def allowed_length(longest: int, lengths: Sequence[int] | None) -> int:
    """The smallest of `lengths` that holds a prompt of `longest` tokens; that itself if None.

    Raises:
      ValueError: there is none.
    """
    if lengths is None:
        return longest
    fitting = [n for n in lengths if n >= longest]
    if not fitting:
        raise ValueError(
            f"a prompt of {longest} tokens is longer than the cache has room for "
            f"({max(lengths)}); shorten it, use smaller images, or allow longer prompts"
        )
    return min(fitting)


def pad_left(array: np.ndarray, length: int, value: Any = 0) -> np.ndarray:
    """The last axis filled up to `length` from the left."""
    room = [(0, 0)] * (array.ndim - 1) + [(length - array.shape[-1], 0)]
    return np.pad(array, room, constant_values=value)


def chat_messages(prompt: Prompt, num_images: int) -> Sequence[Message]:
    """Messages as they are; a question as a user's turn whose images come first."""
    if not isinstance(prompt, str):
        return prompt
    text = {"type": "text", "text": prompt}
    return [{"role": "user", "content": [*[{"type": "image"}] * num_images, text]}]


def end_ids(path: pathlib.Path, *configs: Any) -> tuple[int, ...]:
    """`eos_token_id` of generation_config.json, or of the first configuration that has one."""
    file = path / "generation_config.json"
    found = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    for config in configs:
        found = getattr(config, "eos_token_id", None) if found is None else found
    if found is None:
        return ()
    return (found,) if isinstance(found, int) else tuple(found)


def padding_id(tokenizer: Any, ends: Sequence[int]) -> int:
    """What fills rows: the padding token, or an end token."""
    found = tokenizer.pad_token_id
    return found if found is not None else (ends[0] if ends else 0)


def load_tokenizer(path: str | os.PathLike) -> Any:
    """The tokenizer (transformers') of a local directory; none of its code is run."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)


@dataclasses.dataclass(frozen=True)
class TextFrontend:
    """Prompts of a language model.

    Attributes:
      tokenizer: transformers'.
      make_prompt: (ids, valid) -> what the decoder's `begin` takes.
      chat_template: in place of the tokenizer's own. Without either, prompts stay as they are.
    """

    tokenizer: Any
    make_prompt: Callable[[np.ndarray, np.ndarray], Any]
    chat_template: str | None = None
    image_ids: tuple[int, ...] = ()

    def render(self, prompt: Prompt, num_images: int) -> str:
        """See `Frontend`.

        Raises:
          ValueError: images, or messages without a template.
        """
        if num_images:
            raise ValueError("a text-only model was given an image; drop it, or load another model")
        if self.chat_template is None and self.tokenizer.chat_template is None:
            if isinstance(prompt, str):
                return prompt
            raise ValueError("the tokenizer has no chat template; give text instead of messages")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self.tokenizer.apply_chat_template(
            list(messages), chat_template=self.chat_template, tokenize=False,
            add_generation_prompt=True,
        )  # fmt: skip

    def prepare(
        self, texts: Sequence[str], images: Images, *, lengths: Sequence[int] | None = None
    ) -> TargetInputs:
        """See `Frontend`."""
        for row, given in enumerate(images):
            if len(given):
                raise ValueError(f"row {row} has an image, but the model reads text only")
        bos = self.tokenizer.bos_token
        rows = [
            self.tokenizer(text, add_special_tokens=not (bos and text.startswith(bos)))["input_ids"]
            for text in texts
        ]
        check_tokens(rows)
        length = allowed_length(max(map(len, rows)), lengths)
        ids, valid = pad_prompts(
            rows, pad_id=self.tokenizer.pad_token_id, length=length, side="left"
        )
        return TargetInputs(self.make_prompt(ids, valid), None, ids, valid)


@dataclasses.dataclass(frozen=True)
class Qwen2_5_VLFrontend:
    """Prompts of Qwen2.5-VL; see `Frontend`.

    Attributes:
      processor: of the checkpoint.
    """

    processor: Qwen2_5_VLProcessor

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, transformers'."""
        return self.processor.tokenizer

    @property
    def image_ids(self) -> tuple[int, ...]:
        """Placeholder, start and end of an image."""
        c = self.processor.config
        return c.image_token_id, c.vision_start_token_id, c.vision_end_token_id

    def render(self, prompt: Prompt, num_images: int) -> str:
        """See `Frontend`."""
        return self.processor.render(chat_messages(prompt, num_images))

    def prepare(
        self, texts: Sequence[str], images: Images, *, lengths: Sequence[int] | None = None
    ) -> TargetInputs:
        """See `Frontend`. Images are packed into as many rows as there are prompts."""
        opened = [[open_image(image) for image in row] for row in images]
        made = self.processor(list(texts), opened, rows=len(texts))
        length = allowed_length(made.ids.shape[1], lengths)
        pad = self.processor.tokenizer.pad_token_id or 0
        ids, valid = pad_left(made.ids, length, pad), pad_left(made.valid, length, False)
        places = PromptPlaces(
            positions=pad_left(made.places.positions, length),
            next_positions=made.places.next_positions,
            image_slots=pad_left(made.places.image_slots, length, -1),
        )
        packed = made.images
        prompt = ImagePrompt.at(ids, places, valid=valid)
        images_of = None if packed is None else packed.batch
        return TargetInputs(prompt, images_of, ids, valid, packed)


@dataclasses.dataclass(frozen=True)
class Gemma3Frontend:
    """Prompts of Gemma 3; see `Frontend`.

    Attributes:
      processor: of the checkpoint.
    """

    processor: Gemma3Processor

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, transformers'."""
        return self.processor.tokenizer

    @property
    def image_ids(self) -> tuple[int, ...]:
        """Placeholder, begin and end of an image."""
        c = self.processor.config
        return c.image_token_index, c.boi_token_index, c.eoi_token_index

    def render(self, prompt: Prompt, num_images: int) -> str:
        """See `Frontend`."""
        return self.processor.render(chat_messages(prompt, num_images))

    def prepare(
        self, texts: Sequence[str], images: Images, *, lengths: Sequence[int] | None = None
    ) -> TargetInputs:
        """See `Frontend`. Rows with fewer images than others get black ones, which nobody sees."""
        opened = [[open_image(image) for image in row] for row in images]
        made = self.processor(list(texts), opened)
        length = allowed_length(made.ids.shape[1], lengths)
        pad = self.processor.tokenizer.pad_token_id or 0
        ids, valid = pad_left(made.ids, length, pad), pad_left(made.valid, length, False)
        pixels = made.pixel_values
        pixels = None if pixels is None else pixels.reshape(-1, *pixels.shape[2:])
        return TargetInputs(Gemma3Prompt(ids, valid), pixels, ids, valid)  # type: ignore[arg-type]
