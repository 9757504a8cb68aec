"""Held-out questions, by task."""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from core_jax.data.images import BadImage
from core_jax.data.llava import open_images
from core_jax.data.sources import Source, open_source
from massv_jax.distilling_instructions import NothingToAsk, make_instruction
from massv_jax.experiment import DataConfig, DistillConfig, Experiment
from massv_jax.speculative.decoder import SpeculativeDecoder

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
    source: Source,
    data: DataConfig,
    *,
    num_prompts: int,
    images_only: bool = False,
    check: Callable[[Sequence[Image.Image], Any], None] = lambda images, prompt: None,
) -> tuple[list[Question], dict[str, str]]:
    """The first questions of each task that can be asked.

    Args:
      source: held-out instructions.
      data: how images are placed and limited.
      num_prompts: of each task, at most.
      images_only: see `make_instruction`.
      check: (images, prompt) raises ValueError where the target cannot be asked them.

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
        prompt = "" if images_only else asked.messages(0, [])
        try:
            check(images, prompt)
        except ValueError as error:  # such as a prompt that is too long
            left_out[example.id] = str(error)
            continue
        counts[task] += 1
        found.append(Question(example.id, task.replace(".", "_"), tuple(images), prompt))
    if not found:
        shown = dict(list(left_out.items())[:5])
        raise EvaluationError(f"none of {len(source)} records can be asked: {shown}")
    return found, left_out


def open_questions(
    experiment: Experiment, *, images_only: bool, decoder: SpeculativeDecoder | None = None
) -> tuple[list[Question], dict[str, str]]:
    """Those of `evaluation.source`; of a decoder, those that it can be asked."""
    settings, options = experiment.evaluation, {}
    if decoder is not None:
        limit = {"max_new_tokens": experiment.decoding.max_new_tokens}
        options["check"] = lambda images, prompt: decoder.check([list(images)], [prompt], limit)
    return read_questions(
        open_source(settings.source), experiment.data, num_prompts=settings.num_prompts,
        images_only=images_only, **options,
    )  # fmt: skip
