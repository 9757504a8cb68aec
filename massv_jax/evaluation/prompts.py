"""Held-out questions, by task."""

import collections
import dataclasses
from typing import Any

from PIL import Image

from core_jax.data.images import BadImage
from core_jax.data.llava import open_images
from core_jax.data.sources import Source, open_source
from massv_jax.distilling_instructions import NothingToAsk, make_instruction
from massv_jax.experiment import DataConfig, DistillConfig, Experiment

# As the file has them: first turns, no suffix dropped.
_AS_THEY_ARE = DistillConfig(turns="first", drop_suffix_fraction=0.0)


class EvaluationError(ValueError):
    """What is asked cannot be measured; the message has the remedy."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt to measure with.

    Attributes:
      id: of the record.
      task: its `task` (or `category`) in the file, "all" where there is none.
      images: its images.
      prompt: messages; "" for a target that takes no question.
    """

    id: str
    task: str
    images: tuple[Image.Image, ...]
    prompt: Any


def read_questions(
    source: Source, data: DataConfig, *, num_prompts: int, images_only: bool = False
) -> tuple[list[Question], dict[str, str]]:
    """The first questions of each task that can be asked.

    Args:
      source: held-out instructions.
      data: how images are placed and limited.
      num_prompts: of each task, at most.
      images_only: see `make_instruction`.

    Returns:
      Questions in the file's order, and id -> why a record was left out.

    Raises:
      EvaluationError: there is none.
    """
    found, left_out = [], {}
    counts: collections.Counter[str] = collections.Counter()
    for index in range(len(source)):
        example = source[index]
        task = str(example.extras.get("task", example.extras.get("category", "all")))
        if counts[task] >= num_prompts:
            continue
        try:
            asked = make_instruction(
                example, index, _AS_THEY_ARE, image_place=data.image_place,
                images_only=images_only,
            )  # fmt: skip
            images = open_images(example, data.limits)[: asked.num_images(0)]
        except (NothingToAsk, BadImage) as error:
            left_out[example.id] = str(error)
            continue
        counts[task] += 1
        prompt = "" if images_only else asked.messages(0, [])
        found.append(Question(example.id, task.replace(".", "_"), tuple(images), prompt))
    if not found:
        raise EvaluationError(f"none of {len(source)} records can be asked: {left_out}")
    return found, left_out


def open_questions(
    experiment: Experiment, *, images_only: bool
) -> tuple[list[Question], dict[str, str]]:
    """Those of `evaluation.source`."""
    settings = experiment.evaluation
    return read_questions(
        open_source(settings.source), experiment.data, num_prompts=settings.num_prompts,
        images_only=images_only,
    )  # fmt: skip
