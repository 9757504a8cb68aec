"""From examples to the arrays that VLV's losses take."""

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerBase

from core_jax.data.bad import DataPolicy
from core_jax.data.processors import ImageProcessor
from core_jax.data.resize import RESAMPLE, CropSpec, crop_image
from core_jax.data.sources import Example, clean_text
from vlv_jax.experiment import DataConfig


def sample_index(example_id: str) -> np.int32:
    """A stable number for an example, which its random draws are keyed by.

    It follows from the id, not from the position, so that a cache, another order, or another
    split into processes draws the same noise for the same picture at the same step.
    """
    name = clean_text(example_id)  # a JSON file's ids may hold halves of characters
    return np.int32(zlib.crc32(name.encode()) & 0x7FFFFFFF)


@dataclasses.dataclass(frozen=True)
class ImageViews:
    """Makes the two views of an image: one for the VAE, one for Florence-2.

    The paper crops at the VAE's size and enlarges that crop for Florence-2 (bicubic, 8 bit).
    With `native_crops` it is the other way round: the crop is taken at Florence-2's size and
    shrunk for the VAE, so that Florence-2 sees detail that was in the file.

    Attributes:
      processor: Florence-2's resizing.
      size: side of the VAE's view.
      crop: see `DataConfig`.
      resample: filter of the crop.
      native_crops: see above.
    """

    processor: ImageProcessor
    size: int
    crop: str = "center"
    resample: str = "bilinear"
    native_crops: bool = False

    def __call__(
        self, image: Image.Image, rng: np.random.Generator | None = None
    ) -> dict[str, np.ndarray]:
        """uint8 `image` [size, size, 3] and `florence_image` [size', size', 3]."""
        if self.native_crops:
            shape = self.processor.size
            if shape is None:
                raise ValueError("data.native_crops needs a preprocessor_config.json with a size")
            large = shape if isinstance(shape, int) else shape[0]
            kind = "native_random" if self.crop == "random" else "native"
            spec = CropSpec(size=large, kind=kind, resample=self.resample, small="resize")
            view = crop_image(image, spec, rng)
            small = view.resize((self.size, self.size), RESAMPLE[self.resample])
            return {"image": np.asarray(small), "florence_image": np.asarray(view)}
        spec = CropSpec(size=self.size, kind=self.crop, resample=self.resample)
        view = crop_image(image, spec, rng)
        return {"image": np.asarray(view), "florence_image": self.processor.resize(view)}


def views_of(config: DataConfig, processor: ImageProcessor) -> ImageViews:
    """The views that a data config asks for."""
    return ImageViews(
        processor, config.image_size, config.crop, config.resample, config.native_crops
    )


def policy_of(config: DataConfig, *, require_caption: bool) -> DataPolicy:
    """What a run accepts."""
    return DataPolicy(
        limits=config.limits,
        require_caption=require_caption,
        max_bad_fraction=config.max_bad_fraction,
    )


def make_transform(
    views: ImageViews,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_tokens: int = 0,
    supervise_eos: bool = True,
    keep: Sequence[str] = ("image", "florence_image"),
) -> Callable[[Image.Image, Example, np.random.Generator], Mapping[str, Any]]:
    """A row of a batch: the views, the sample's index and, given a tokenizer, its caption.

    Args:
      views: see `ImageViews`.
      tokenizer: of the language model; None leaves captions out (stage 1).
      max_tokens: length of `tokens`.
      supervise_eos: see `CaptioningConfig`.
      keep: which views; a caption-only loss does not need the VAE's.
    """

    def transform(image: Image.Image, example: Example, rng: np.random.Generator):
        row = {k: v for k, v in views(image, rng).items() if k in keep}
        row["index"] = sample_index(example.id)
        if tokenizer is not None:
            row |= caption_row(
                tokenizer, example.caption or "", max_tokens, supervise_eos=supervise_eos
            )
        return row

    return transform


def caption_row(
    tokenizer: PreTrainedTokenizerBase, caption: str, length: int, *, supervise_eos: bool
) -> dict[str, np.ndarray]:
    """`tokens` int32 [length] and `supervised` bool [length] of one caption.

    The caption is followed by the end-of-text token, then padding. The released code has neither
    (its padding token is the end token, and ignored), so its captions never learn to end; see
    docs/deviations.md. A caption that is too long is cut and then has no end.

    Raises:
      ValueError: the tokenizer has no end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the language model's tokenizer has no eos_token")
    ids = tokenizer(caption, add_special_tokens=False)["input_ids"]
    ids = ids[:length] if not supervise_eos else [*ids, tokenizer.eos_token_id][:length]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    tokens = np.full(length, pad, np.int32)
    tokens[: len(ids)] = ids
    return {"tokens": tokens, "supervised": np.arange(length) < len(ids)}
