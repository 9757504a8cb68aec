"""Rendered scenes and their texts as arrays, made once and kept in a cache folder."""

import pathlib

import numpy as np

from miniature.world import Scene, describe, questions, render, sample_scene
from miniature.world.vocabulary import IMAGE_SIZE


def scenes(split: str, start: int, count: int, *, seed: int = 0) -> list[Scene]:
    """Consecutive scenes of a split."""
    return [sample_scene(seed, start + i, split) for i in range(count)]


def images(split: str, start: int, count: int, *, cache: pathlib.Path, seed: int = 0) -> np.ndarray:
    """Their pictures, uint8 [count, 64, 64, 3]; memory-mapped from the cache once rendered.

    Args:
      split: train, validation or heldout.
      start: first scene.
      count: number of scenes.
      cache: folder of the rendered arrays.
      seed: of the world.
    """
    cache.mkdir(parents=True, exist_ok=True)
    file = cache / f"{split}-{seed}-{start}-{count}.npy"
    if not file.exists():
        partial = file.with_suffix(".partial.npy")
        shape = (count, IMAGE_SIZE, IMAGE_SIZE, 3)
        out = np.lib.format.open_memmap(partial, "w+", np.uint8, shape)
        for i in range(count):
            out[i] = render(sample_scene(seed, start + i, split))
        out.flush()
        partial.rename(file)
    return np.load(file, mmap_mode="r")


def captions(all_scenes: list[Scene], *, style: str, seed: int) -> list[str]:
    """One wording of each scene."""
    return [describe(s, seed, style) for s in all_scenes]


def question_texts(scene: Scene, seed: int) -> list[tuple[str, str]]:
    """(question, answer) pairs of a scene."""
    return [(q.question, q.answer) for q in questions(scene, seed)]
