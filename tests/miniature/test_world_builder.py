"""What is written to disk comes back as it was."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from miniature.world import STYLES, Scene, describe, questions, render, sample_scene
from miniature.world.folder import write_folder


def test_folder_has_both_formats_and_a_manifest(tmp_path):
    manifest = write_folder(tmp_path / "scenes", split="heldout", start=3, count=4, seed=1)
    records = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert [r["id"] for r in records] == [f"heldout-1-{i:07d}" for i in range(3, 7)]
    assert [r["file_name"].split(".")[1] for r in records] == ["jpg", "png", "jpg", "png"]
    for i, line in enumerate(records):
        scene = sample_scene(1, 3 + i, "heldout")
        assert Scene.from_json(line["scene"]) == scene
        assert line["caption"] == describe(scene)
        assert line["questions"] == [vars(qa) for qa in questions(scene)]
        pixels = np.asarray(Image.open(manifest.parent / line["file_name"])).astype(int)
        error = np.abs(pixels - render(scene)).mean()
        assert error == 0 if line["file_name"].endswith("png") else 0 < error < 4


def test_folder_refuses_unknown_formats(tmp_path):
    with pytest.raises(ValueError, match=r"\['gif'\]; there are jpeg, png"):
        write_folder(tmp_path, split="train", start=0, count=1, formats=("gif",))


@pytest.mark.parametrize("style", STYLES)
def test_tfds_round_trip_without_tensorflow(tmp_path, style):
    from miniature.world.tfds_builder import MiniatureConfig, MiniatureWorld

    config = MiniatureConfig(name=f"test_{style}", style=style, train=6, validation=3, heldout=2)
    builder = MiniatureWorld(data_dir=tmp_path, config=config, file_format="array_record")
    builder.download_and_prepare()
    assert {k: v.num_examples for k, v in builder.info.splits.items()} == {
        "train": 6, "validation": 3, "heldout": 2,
    }  # fmt: skip
    seen = set()
    for example in builder.as_data_source(split="train"):
        scene = Scene.from_json(example["scene"])
        seen.add(scene.id)
        assert scene.id == example["id"].decode()
        assert example["caption"].decode() == describe(scene, 0, style)
        np.testing.assert_array_equal(example["image"], render(scene))
        asked = questions(scene)
        assert [q.decode() for q in example["questions"]] == [qa.question for qa in asked]
        assert [a.decode() for a in example["answers"]] == [qa.answer for qa in asked]
    assert seen == {f"train-0-{i:07d}" for i in range(6)}
    assert "tensorflow" not in sys.modules
