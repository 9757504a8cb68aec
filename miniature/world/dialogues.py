"""Conversations about scenes, as instruction sets for vision-language models have them."""

import random

from miniature.world.captions import describe
from miniature.world.qa import questions
from miniature.world.scenes import Scene

DESCRIBE = (
    "Describe the image in detail.",
    "Describe in detail what is shown in the image.",
    "What is in the picture?",
)
Turns = list[tuple[str, str]]


def description(scene: Scene, seed: int = 0, style: str = "default") -> Turns:
    """One turn: a request to describe the scene, and a caption.

    Args:
        scene: what is described.
        seed: another seed, another wording of both.
        style: the answer's author, one of `captions.STYLES`.

    Returns:
        [(question, answer)].
    """
    rng = random.Random(f"{scene.id}/{seed}/request")
    return [(rng.choice(DESCRIBE), describe(scene, seed, style))]


def interview(scene: Scene, seed: int = 0, turns: int = 4) -> Turns:
    """Questions with answers of one or two words, each kind at most once, in any order.

    Args:
        scene: what is asked about.
        seed: another seed, other questions.
        turns: how many.

    Returns:
        [(question, answer)].
    """
    asked = questions(scene, seed)
    rng = random.Random(f"{scene.id}/{seed}/interview")
    return [(qa.question, qa.answer) for qa in rng.sample(asked, min(turns, len(asked)))]
