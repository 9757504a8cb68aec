"""Questions about an image answered from its caption alone, by a language model that is passed in.

The paper does not publish its prompt or its choice of examples ("following De-Diffusion"), so both
are settings here and belong beside every number. What a caption is worth lies between two numbers
measured the same way: the answers without any caption, and those from true captions.
"""

import collections
import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Protocol

from core_jax.evaluation.bootstrap import Estimate, bootstrap_ratio
from vlv_jax.evaluation.answers import exact_match, vqa_accuracy

METRICS = {"exact_match": exact_match, "vqa_accuracy": vqa_accuracy}


class Answerer(Protocol):
    """Continues prompts: a language model with its decoding settings."""

    def __call__(self, prompts: list[str]) -> list[str]:
        """Returns one continuation a prompt, in order."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A question about an image.

    Attributes:
        image: Name of the image; questions of one image are resampled together.
        question: The question.
        answers: The right answers, one or one an annotator.
        kind: A group to report on its own, or "".
    """

    image: str
    question: str
    answers: tuple[str, ...]
    kind: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shot:
    """An example with its answer, put before the question."""

    caption: str
    question: str
    answer: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """How captions and questions become a prompt.

    Attributes:
        instruction: First paragraph; may be empty.
        example: One example up to where the answer goes; {caption} and {question} are replaced.
        separator: Between paragraphs.
    """

    instruction: str = "Answer the question about the image in one or two words."
    example: str = "Image: {caption}\nQuestion: {question}\nAnswer:"
    separator: str = "\n\n"

    def prompt(self, caption: str, question: str, shots: Sequence[Shot] = ()) -> str:
        """Returns the text to continue; it ends where the answer begins."""
        parts = [self.instruction] if self.instruction else []
        parts += [f"{self._fill(s.caption, s.question)} {s.answer}" for s in shots]
        return self.separator.join([*parts, self._fill(caption, question)])

    def _fill(self, caption: str, question: str) -> str:
        # Not str.format: captions may contain braces. One line each, as in the shots.
        text = self.example.replace("{question}", " ".join(question.split()))
        return text.replace("{caption}", " ".join(caption.split()))


@dataclasses.dataclass(frozen=True)
class VqaResult:
    """What an answerer made of a set of captions.

    Attributes:
        accuracy: Over all questions, resampled by image.
        by_kind: The same for each kind of question.
        answers: The answer to each question, cut to its first line.
        correct: Its accuracy, 0 to 1.
    """

    accuracy: Estimate
    by_kind: dict[str, Estimate]
    answers: list[str]
    correct: list[float]


def choose_shots(pool: Sequence[Shot], k: int, seed: int = 0) -> list[Shot]:
    """Returns k examples of the pool, the same for the same seed; fewer k are a prefix of more.

    Raises:
        ValueError: The pool has fewer than k.
    """
    if k > len(pool):
        raise ValueError(f"{k} shots from a pool of {len(pool)} examples")
    order = list(pool)
    random.Random(seed).shuffle(order)
    return order[:k]


def first_line(continuation: str) -> str:
    """Returns the answer in a continuation: its first line with text in it."""
    stripped = continuation.strip()
    return stripped.splitlines()[0].strip() if stripped else ""


def answer_questions(
    answerer: Answerer,
    questions: Sequence[Question],
    captions: Mapping[str, str],
    *,
    shots: Sequence[Shot] = (),
    prompt_format: PromptFormat | None = None,
    metric: str = "exact_match",
    batch_size: int = 256,
    **options,
) -> VqaResult:
    """Asks every question about the caption of its image.

    Args:
        answerer: The language model.
        questions: What is asked.
        captions: Image name -> caption; an image's caption may be "".
        shots: Examples before every question.
        prompt_format: How the prompt is written; None is the default one.
        metric: "exact_match" or "vqa_accuracy".
        batch_size: Most prompts in one call of the answerer.
        **options: As for `bootstrap.bootstrap_sums`.

    Returns:
        Answers and accuracies.

    Raises:
        ValueError: No questions, an unknown metric, images without a caption (named), or an
            answerer that returns another number of answers.
    """
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; known are {', '.join(METRICS)}")
    if not questions:
        raise ValueError("there are no questions to ask")
    missing = sorted({q.image for q in questions} - captions.keys())
    if missing:
        raise ValueError(f"{len(missing)} images have questions but no caption: {missing[:5]}")
    prompt_format = prompt_format or PromptFormat()
    prompts = [prompt_format.prompt(captions[q.image], q.question, shots) for q in questions]
    answers = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        given = answerer(batch)
        if len(given) != len(batch):
            raise ValueError(f"the answerer returned {len(given)} answers to {len(batch)} prompts")
        answers += [first_line(text) for text in given]
    correct = [
        METRICS[metric](answer, question.answers)
        for answer, question in zip(answers, questions, strict=True)
    ]
    groups = collections.defaultdict(list)
    for question, right in zip(questions, correct, strict=True):
        groups[question.kind].append((question.image, right))
    everything = [pair for pairs in groups.values() for pair in pairs]
    by_kind = {kind: _by_image(groups[kind], options) for kind in sorted(groups) if kind}
    return VqaResult(_by_image(everything, options), by_kind, answers, correct)


def _by_image(pairs: Sequence[tuple[str, float]], options) -> Estimate:
    right, asked = collections.defaultdict(float), collections.defaultdict(int)
    for image, value in pairs:
        right[image] += value
        asked[image] += 1
    images = sorted(asked)
    return bootstrap_ratio([right[i] for i in images], [asked[i] for i in images], **options)


def compare_captions(
    answerer: Answerer,
    questions: Sequence[Question],
    captions: Mapping[str, Mapping[str, str]],
    **settings,
) -> dict[str, VqaResult]:
    """Asks the same questions about several sets of captions.

    Args:
        answerer: The language model.
        questions: What is asked.
        captions: Name of the set -> image name -> caption. Give the true captions as one of the
            sets: their accuracy is the ceiling of this answerer.
        **settings: As for `answer_questions`.

    Returns:
        Name of the set -> result, and "no_caption": the same questions about empty captions.
    """
    sets = {**captions, "no_caption": dict.fromkeys({q.image for q in questions}, "")}
    return {
        name: answer_questions(answerer, questions, captions_of_set, **settings)
        for name, captions_of_set in sets.items()
    }
