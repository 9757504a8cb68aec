"""LLaVA's two data sets as TensorFlow Datasets builders that need no TensorFlow.

    from core_jax.data.llava_tfds import LlavaMix665k

    builder = LlavaMix665k(
        data_dir="tfds", file_format="array_record",
        annotations="llava_v1_5_mix665k.json", images="images",
    )
    builder.download_and_prepare()

Nothing is downloaded: the files are those of liuhaotian/LLaVA-Pretrain and of LLaVA-1.5's mix,
whose images come from COCO, GQA, OCR-VQA, TextVQA and Visual Genome. What was prepared is read with
`SourceSpec(kind="tfds", path="tfds/llava_mix665k/1.0.0", split="train")`; its examples are those of
`LlavaSource`. Importing this module registers the builders.
"""

import json
import os
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from core_jax.data.images import BadImage, ImageLimits, decode_image
from core_jax.data.llava import LlavaSource
from core_jax.data.llava_exclude import read_exclusions, without_images
from core_jax.data.sources import Source, SourceError
from core_jax.data.tfds_source import EXTRAS_KEY


class LlavaBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """One LLaVA-format file with its images, encoded as they are.

    A record without an image has an empty one; several images to a record are not supported here.
    Records whose image is missing or broken are left out and counted in `left_out`.

    Args:
      annotations: the .json or .jsonl file.
      images: folder that its image paths are relative to.
      exclude: file with names of evaluation images to leave out (core_jax.data.llava_exclude).
      limits: what an acceptable image is.
      **options: of the base class; `file_format` must be "array_record".
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}  # noqa: RUF012 (the base class declares it so)
    SUMMARY = ""

    def __init__(
        self,
        *,
        annotations: str | os.PathLike | None = None,
        images: str | os.PathLike | None = None,
        exclude: str | os.PathLike | None = None,
        limits: ImageLimits | None = None,
        **options: Any,
    ):
        self._annotations, self._images, self._exclude = annotations, images, exclude
        self._limits = limits or ImageLimits()
        self.left_out: dict[str, str] = {}
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.SUMMARY,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "caption": text,
                    "id": text,
                    EXTRAS_KEY: text,
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager  # nothing is downloaded
        if self._annotations is None:
            raise SourceError(
                f"{self.name}: name the local copy, annotations='....json' and images='folder'"
            )
        source: Source = LlavaSource(self._annotations, images=self._images)
        if self._exclude is not None:
            source = without_images(source, read_exclusions(self._exclude))[0]
        return {"train": self._generate_examples(source)}

    def _generate_examples(self, source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
        for index in range(len(source)):
            example = source[index]
            extras = {k: v for k, v in example.extras.items() if k != "image_root"}
            if len(extras["image_names"]) > 1:
                self.left_out[example.id] = "several images"
                continue
            encoded = b""
            try:
                if example.image is not None:
                    encoded = example.encoded_image(self._limits)
                    decode_image(encoded, self._limits)
            except BadImage as error:
                self.left_out[example.id] = str(error.reason)
                continue
            # The key is hashed to shuffle; the number keeps it unique.
            yield (
                f"{index:09d}",
                {
                    "image": encoded,
                    "caption": example.caption or "",
                    "id": example.id,
                    EXTRAS_KEY: json.dumps(extras, ensure_ascii=False),
                },
            )


class LlavaPretrain558k(LlavaBuilder):
    """LCS-558K: 558,128 images of LAION, CC and SBU with BLIP's captions."""

    SUMMARY = "liuhaotian/LLaVA-Pretrain: images of LAION, CC and SBU with short captions."


class LlavaMix665k(LlavaBuilder):
    """LLaVA-1.5's instruction mix: 665,298 conversations, some 40,000 of them without an image."""

    SUMMARY = (
        "LLaVA-1.5's mix of visual instructions, with some 40,000 conversations of text."
    )
