"""Scenes as a folder of image files with captions beside them, the way people keep their own."""

import json
from collections.abc import Sequence
from pathlib import Path

from miniature.world.captions import describe
from miniature.world.qa import questions
from miniature.world.rendering import render_image
from miniature.world.scenes import Scene, sample_scene

_SUFFIXES = {"jpeg": ".jpg", "png": ".png"}


def write_folder(
    directory: str | Path,
    *,
    split: str,
    start: int,
    count: int,
    seed: int = 0,
    style: str = "default",
    formats: Sequence[str] = ("jpeg", "png"),
) -> Path:
    """Writes scenes `start` to `start + count - 1` of a split as image files and a manifest.

    Each line of `captions.jsonl` has `file_name`, `caption`, `id`, `questions` (a list of objects
    with `question`, `answer`, `kind`), `style` and `scene` (the ground truth, JSON in a string).
    File names sort in the order of the index.

    Args:
        directory: made if missing; files of the same names are overwritten.
        split: one of `vocabulary.SPLITS`.
        start: the first index.
        count: how many.
        seed: which world.
        style: the captions' author.
        formats: taken in turn; 'jpeg' (quality 95, full chroma) or 'png' (exact).

    Returns:
        The path of `captions.jsonl`.

    Raises:
        ValueError: for an unknown format, split or style.
    """
    unknown = sorted(set(formats) - set(_SUFFIXES))
    if unknown or not formats:
        raise ValueError(f"unknown formats {unknown}; there are {', '.join(_SUFFIXES)}")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        scene = sample_scene(seed, start + i, split)
        kind = formats[i % len(formats)]
        name = scene.id + _SUFFIXES[kind]
        options = {"quality": 95, "subsampling": 0} if kind == "jpeg" else {}
        render_image(scene).save(directory / name, format=kind.upper(), **options)
        lines.append(json.dumps({"file_name": name, **record(scene, style)}) + "\n")
    manifest = directory / "captions.jsonl"
    manifest.write_text("".join(lines), encoding="utf-8")
    return manifest


def record(scene: Scene, style: str = "default") -> dict:
    """Everything that is stored with a picture, in types that JSON knows."""
    return {
        "caption": describe(scene, 0, style),
        "id": scene.id,
        "questions": [vars(qa) for qa in questions(scene, 0)],
        "style": style,
        "scene": scene.to_json(),
    }
