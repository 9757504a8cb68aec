"""Mixtures of words: they are of the text or the scene, and nothing else."""

import numpy as np
import pytest

from miniature.pretrain.soft_words import LENGTH, WORDS, bags, blurred
from miniature.world.scenes import sample_scene

SCENE = sample_scene(0, 5, "train")


class Words:
    """A tokenizer of whole words."""

    def __init__(self):
        self.known: list[str] = []

    def __call__(self, text):
        word = text.strip()
        assert text == " " + word  # as it stands within a sentence
        if word not in self.known:
            self.known.append(word)
        return {"input_ids": [self.known.index(word)]}


def test_a_blurred_text_mixes_neighbours():
    text = list(range(100, 140))
    widths = set()
    for seed in range(80):
        ids, weights = blurred(text, np.random.default_rng(seed))
        assert ids.shape == weights.shape == (LENGTH, WORDS)
        for row, weight in zip(ids, weights, strict=True):
            part = row[weight > 0]
            assert part.tolist() == list(range(part[0], part[0] + len(part)))
            assert set(part.tolist()) <= set(text)
        widths.add(int((weights > 0).sum(axis=1).max()))
        assert (weights[weights > 0] >= 0.2).all()
    assert widths == set(range(1, WORDS + 1))


@pytest.mark.parametrize("length", [1, 3])
def test_a_text_shorter_than_the_blur_is_whole(length):
    for seed in range(10):
        ids, weights = blurred(list(range(7, 7 + length)), np.random.default_rng(seed))
        assert set(ids[weights > 0].tolist()) <= set(range(7, 7 + length))
        assert (weights > 0).any(axis=1).all()


def test_a_bag_has_words_of_one_thing_only():
    words = Words()
    ids, weights = bags(SCENE, words, np.random.default_rng(0))
    things = [
        {o.size, o.colour, o.shape, *([] if o.texture == "plain" else [o.texture])}
        for o in SCENE.objects
    ]
    said = set()
    for row, weight in zip(ids, weights, strict=True):
        mixed = {words.known[i] for i in row[weight > 0]}
        said |= mixed
        colours = {o.colour for o in SCENE.objects} & mixed
        shapes = {o.shape for o in SCENE.objects} & mixed
        if colours and shapes:
            assert any(colours | shapes <= thing for thing in things)
    assert {o.shape for o in SCENE.objects} <= said
    assert {SCENE.background.top, SCENE.background.bottom} <= said


def test_equal_seeds_give_equal_mixtures():
    first, again, other = (
        bags(SCENE, Words(), np.random.default_rng(seed)) for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first[0], again[0])
    assert not np.array_equal(first[1], other[1])
