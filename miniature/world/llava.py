"""The world as an instruction set in LLaVA's format, a folder of images beside JSON files."""

import json
from pathlib import Path
from typing import Any

from miniature.world.dialogues import Turns, description, interview
from miniature.world.rendering import render_image
from miniature.world.scenes import Scene, sample_scene

# Whoever wrote the data set's answers is not the target, as with LLaVA's.
DATA_STYLE, TARGET_STYLE = "chatty", "default"
DESCRIPTIONS, QUESTIONS = "descriptions", "questions"
_IMAGES = "images"


def write_llava(directory: str | Path, *, train: int, heldout: int, seed: int = 0) -> None:
    """Writes `images/` and files of records with an image and a question each.

    `captions.json` (for a projector's pretraining) and `instructions.json` are about the same
    `train` scenes; two thirds of the instructions ask for a description.
    `instructions_own_wording.json` has the same with answers in the target's words, so that the
    difference that the wording makes can be told from the rest. `heldout.json` has
    `heldout` records of each of the two tasks, named in `task`, about scenes with combinations
    that training never has.

    Args:
        directory: made if missing; files of the same names are overwritten.
        train: number of training scenes.
        heldout: number of held-out scenes.
        seed: which world.
    """
    directory = Path(directory)
    (directory / _IMAGES).mkdir(parents=True, exist_ok=True)
    seen = [sample_scene(seed, i, "train") for i in range(train)]
    unseen = [sample_scene(seed, i, "heldout") for i in range(heldout)]
    for scene in (*seen, *unseen):
        render_image(scene).save(directory / _IMAGES / _file_name(scene))
    captions = [_record(scene, DESCRIPTIONS, 1) for scene in seen]
    tasks = [QUESTIONS if i % 3 == 2 else DESCRIPTIONS for i in range(train)]
    instructions, own_wording = (
        [_record(scene, task, 2, style) for scene, task in zip(seen, tasks, strict=True)]
        for style in (DATA_STYLE, TARGET_STYLE)
    )
    tested = [_record(scene, task, 3) for task in (DESCRIPTIONS, QUESTIONS) for scene in unseen]
    for name, records in (
        ("captions", captions), ("instructions", instructions),
        ("instructions_own_wording", own_wording), ("heldout", tested),
    ):  # fmt: skip
        text = json.dumps(records, indent=1)
        (directory / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def _file_name(scene: Scene) -> str:
    return f"{scene.id}.png"


def _record(scene: Scene, task: str, seed: int, style: str = DATA_STYLE) -> dict[str, Any]:
    describes = task == DESCRIPTIONS
    turns = description(scene, seed, style) if describes else interview(scene, seed, turns=1)
    return {
        "id": f"{scene.id}-{task}",
        "image": _file_name(scene),
        "task": task,
        "conversations": _conversation(turns),
    }


def _conversation(turns: Turns) -> list[dict[str, str]]:
    spoken = []
    for i, (question, answer) in enumerate(turns):
        place = "" if i else "<image>\n"
        spoken.append({"from": "human", "value": place + question})
        spoken.append({"from": "gpt", "value": answer})
    return spoken
