"""The miniature world as a TensorFlow Datasets builder that needs no TensorFlow.

    builder = MiniatureWorld(data_dir=..., config="smoke", file_format="array_record")
    builder.download_and_prepare()
    source = builder.as_data_source(split="train")

Importing this module registers the builder, after which `tfds.data_source("miniature_world/smoke",
data_dir=...)` finds what was prepared. `as_dataset` and `tfds.load` would need TensorFlow.
"""

import dataclasses

import tensorflow_datasets as tfds

from miniature.world import vocabulary as vocab
from miniature.world.folder import record
from miniature.world.rendering import render_image
from miniature.world.scenes import sample_scene


@dataclasses.dataclass
class MiniatureConfig(tfds.core.BuilderConfig):
    """How much of the world is written out.

    Attributes:
        seed: which world.
        style: the captions' author, one of `captions.STYLES`.
        train: number of training scenes.
        validation: number of scenes of seen combinations.
        heldout: number of scenes with combinations never seen in training.
    """

    seed: int = 0
    style: str = "default"
    train: int = 20_000
    validation: int = 1_000
    heldout: int = 1_000


class MiniatureWorld(tfds.core.GeneratorBasedBuilder):
    """Scenes with captions, questions and ground truth; splits train, validation, heldout."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}  # noqa: RUF012 (the base class declares it so)
    BUILDER_CONFIGS = [  # noqa: RUF012
        MiniatureConfig(name="full"),
        MiniatureConfig(name="full_terse", style="terse"),
        MiniatureConfig(name="full_chatty", style="chatty"),
        MiniatureConfig(name="smoke", train=96, validation=24, heldout=24),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            description="Procedural scenes of a few coloured shapes, described in detail.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(
                        shape=(vocab.IMAGE_SIZE, vocab.IMAGE_SIZE, 3), encoding_format="png"
                    ),
                    "caption": text,
                    "id": text,
                    "questions": tfds.features.Sequence(text),
                    "answers": tfds.features.Sequence(text),
                    "kinds": tfds.features.Sequence(text),
                    "style": text,
                    "scene": text,
                }
            ),
            supervised_keys=("image", "caption"),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager  # nothing is downloaded
        config = self.builder_config
        return {split: self._generate_examples(split, config) for split in vocab.SPLITS}

    def _generate_examples(self, split: str, config: MiniatureConfig):
        for index in range(getattr(config, split)):
            scene = sample_scene(config.seed, index, split)
            example = record(scene, config.style)
            asked = example.pop("questions")
            example["questions"] = [qa["question"] for qa in asked]
            example["answers"] = [qa["answer"] for qa in asked]
            example["kinds"] = [qa["kind"] for qa in asked]
            # A Pillow image: encoding an array would run TensorFlow.
            yield scene.id, {"image": render_image(scene), **example}
