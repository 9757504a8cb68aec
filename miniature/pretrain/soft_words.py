"""Vectors between words: prefixes in which each vector is a mixture of words' embeddings.

A language model of three billion parameters reads vectors that are no words after a little
training (prompt tuning, arXiv 2104.08691; a whole document in one vector, arXiv 2405.13792): what
it knows of words carries over. One of two million does not, so its stand-in learns it here. The
mixtures come from text alone, anew in each row; nothing in them is a picture's or VLV's.
"""

from typing import Any

import numpy as np

from miniature.world import vocabulary as vocab
from miniature.world.scenes import Scene

LENGTH = 77  # vectors of a prefix
WORDS = 8  # of a mixture, at most
Mixtures = tuple[np.ndarray, np.ndarray]  # ids int32 [77, 8], weights float32 [77, 8]


def blurred(ids: list[int], rng: np.random.Generator) -> Mixtures:
    """A text out of focus: every vector mixes neighbouring words.

    Args:
      ids: of the text.
      rng: draws how far it is out of focus, and where each vector looks.
    """
    words, weights = _empty()
    text = np.asarray(ids, np.int32)
    width = int(rng.integers(1, WORDS + 1))
    starts = np.sort(rng.integers(0, max(1, len(text) - width + 1), LENGTH))
    if rng.random() < 0.5:
        rng.shuffle(starts)
    for row, start in enumerate(starts):
        part = text[start : start + width]
        words[row, : len(part)] = part
        weights[row, : len(part)] = rng.uniform(0.2, 1.0, len(part))
    return words, weights


def bags(scene: Scene, tokenizer: Any, rng: np.random.Generator) -> Mixtures:
    """Facts without grammar: every vector mixes some of the words of one object or background."""
    words, weights = _empty()
    facts = [_words_of(thing) for thing in scene.objects]
    background = ("background", *dict.fromkeys((scene.background.top, scene.background.bottom)))
    facts.append(list(background))
    of_facts = [[_id(tokenizer, word) for word in fact] for fact in facts]
    kept = rng.uniform(0.4, 1.0)
    about = rng.integers(len(facts), size=LENGTH)
    if rng.random() < 0.5:
        about.sort()
    for row, fact in enumerate(about):
        chosen = [i for i in of_facts[fact] if rng.random() < kept][:WORDS]
        words[row, : len(chosen)] = chosen
        weights[row, : len(chosen)] = rng.uniform(0.2, 1.0, len(chosen))
    return words, weights


def _empty() -> Mixtures:
    return np.zeros((LENGTH, WORDS), np.int32), np.zeros((LENGTH, WORDS), np.float32)


def _words_of(thing: Any) -> list[str]:
    texture = [] if thing.texture == "plain" else [thing.texture]
    return [thing.size, thing.colour, thing.shape, *texture, *vocab.CELLS[thing.cell].split()]


def _id(tokenizer: Any, word: str) -> int:
    """Of the word as it stands within a sentence."""
    return tokenizer(" " + word)["input_ids"][0]
