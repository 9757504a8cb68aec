"""The world as an instruction set: what MASSV's own reader makes of it."""

import json

import pytest

from core_jax.data.llava import LlavaSource, parse_dialogue
from miniature.world.dialogues import DESCRIBE, interview
from miniature.world.llava import write_llava
from miniature.world.parsing import parse
from miniature.world.scenes import sample_scene


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llava")
    write_llava(path, train=9, heldout=3)
    return path


@pytest.mark.parametrize(
    ("name", "count"),
    [("captions", 9), ("instructions", 9), ("instructions_own_wording", 9), ("heldout", 6)],
)
def test_every_record_is_read(folder, name, count):
    source = LlavaSource(folder / f"{name}.json", images=folder / "images")
    assert len(source) == count
    for i in range(count):
        example = source[i]
        dialogue = parse_dialogue(example.extras["conversations"], 1)
        assert not dialogue.faults
        (turn,) = dialogue.turns
        assert turn.question[0] is None
        assert (turn.question[1] in DESCRIBE) == (example.extras["task"] == "descriptions")
        assert example.image.exists()


def test_files_differ_in_wording_alone(folder):
    data, own = (
        json.loads((folder / f"{name}.json").read_text())
        for name in ("instructions", "instructions_own_wording")
    )
    said = [[r["conversations"][1]["value"] for r in records] for records in (data, own)]
    assert [r["id"] for r in data] == [r["id"] for r in own]
    for i, (ours, theirs) in enumerate(zip(*said, strict=True)):
        assert (ours == theirs) == (i % 3 == 2)  # short answers are the same
    scene = sample_scene(0, 0, "train")
    parsed = parse(said[1][0])
    assert {o.key for o in scene.objects} == {(o.colour, o.shape) for o in parsed.objects}


def test_held_out_scenes_are_not_trained_on(folder):
    train, heldout = (
        {r["image"] for r in json.loads((folder / f"{name}.json").read_text())}
        for name in ("instructions", "heldout")
    )
    assert not train & heldout
    tasks = [r["task"] for r in json.loads((folder / "heldout.json").read_text())]
    assert tasks == ["descriptions"] * 3 + ["questions"] * 3


def test_interviews_ask_each_kind_at_most_once():
    scene = sample_scene(0, 1, "train")
    asked = interview(scene, 4, turns=20)
    assert len({q for q, _ in asked}) == len(asked) >= 8
    assert interview(scene, 4, turns=20) == asked
    assert len(interview(scene, 4, turns=2)) == 2
