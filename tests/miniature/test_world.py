"""Scenes and pictures: determinism, splits, and that what differs looks different."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from miniature.world import Background, Object, Scene, render, sample_scene
from miniature.world import vocabulary as vocab


@pytest.mark.parametrize("split", vocab.SPLITS)
def test_scenes_are_deterministic_and_differ(split):
    scenes = [sample_scene(0, i, split) for i in range(50)]
    assert scenes == [sample_scene(0, i, split) for i in range(50)]
    contents = {s.to_json().split('"id"')[0] + s.to_json().split('"objects"')[1] for s in scenes}
    assert len(contents) == 50
    assert scenes[0].objects != sample_scene(1, 0, split).objects
    np.testing.assert_array_equal(render(scenes[7]), render(scenes[7]))


def test_a_scene_is_what_it_always_was():
    """Results are comparable only as long as the world stays the same."""
    scene = sample_scene(0, 5, "heldout")
    assert [(o.size, o.texture, o.colour, o.shape, vocab.CELLS[o.cell]) for o in scene.objects] == [
        ("large", "dotted", "blue", "square", "top right"),
        ("large", "plain", "green", "star", "left"),
        ("small", "plain", "yellow", "triangle", "bottom left"),
    ]
    # Pillow's versions may disagree about a pixel of an edge.
    assert render(scene).astype(int).sum() == pytest.approx(2_827_500, rel=1e-3)


def test_held_out_triples_only_in_held_out_scenes():
    assert len(vocab.HELD_OUT_TRIPLES) == 12
    for split in ("train", "validation"):
        for i in range(1000):
            triples = {o.triple for o in sample_scene(0, i, split).objects}
            assert not triples & vocab.HELD_OUT_TRIPLES
    shown = set()
    for i in range(300):
        new = {o.triple for o in sample_scene(0, i, "heldout").objects} & vocab.HELD_OUT_TRIPLES
        assert new
        shown |= new
    assert shown == vocab.HELD_OUT_TRIPLES


def test_training_shows_every_value_and_every_pair_of_shape_and_colour():
    objects = [o for i in range(3000) for o in sample_scene(0, i, "train").objects]
    assert {o.triple for o in objects} == set(vocab.SEEN_TRIPLES)
    assert {o.key for o in objects} == set(itertools.product(vocab.COLOURS, vocab.SHAPES))
    assert {o.cell for o in objects} == set(range(9))
    assert {o.texture for o in objects} == set(vocab.TEXTURES)


def test_objects_stay_in_their_cells_and_are_unique():
    third = vocab.IMAGE_SIZE * 4 / 3
    for i in range(1000):
        scene = sample_scene(2, i, "train")
        assert vocab.MIN_OBJECTS <= len(scene.objects) <= vocab.MAX_OBJECTS
        assert len({o.key for o in scene.objects}) == len(scene.objects)
        assert len({o.cell for o in scene.objects}) == len(scene.objects)
        for obj in scene.objects:
            for at, index in zip(obj.centre, (obj.column, obj.row), strict=True):
                assert index * third <= at - obj.diameter / 2 + 2
                assert at + obj.diameter / 2 <= (index + 1) * third + 2


def test_json_round_trip_and_errors():
    for i in range(100):
        scene = sample_scene(0, i, "heldout")
        assert Scene.from_json(scene.to_json()) == scene
        assert "\n" not in scene.to_json()
    fields = json.loads(scene.to_json())
    del fields["objects"][0]["shape"]
    for text in (json.dumps(fields), "{}", "[]", "null"):
        with pytest.raises(ValueError, match=r"Scene\.to_json"):
            Scene.from_json(text)
    with pytest.raises(ValueError, match="unknown split 'test'; there are train"):
        sample_scene(0, 0, "test")
    with pytest.raises(ValueError, match="0 or more"):
        sample_scene(0, -1, "train")


def _one(**changes) -> Scene:
    fields = {"shape": "circle", "colour": "red", "size": "small", "texture": "plain", "cell": 4}
    fields |= changes
    obj = Object(
        **fields,
        centre=(127, 127),
        diameter=vocab.DIAMETERS[fields["size"]][0],
        rgb=vocab.COLOURS[fields["colour"]],
    )
    grey = vocab.BACKGROUNDS["grey"]
    background = Background(top="grey", bottom="grey", top_rgb=grey, bottom_rgb=grey)
    return Scene(id="x", objects=(obj,), background=background)


@pytest.mark.parametrize("size", vocab.SIZES)
def test_every_change_of_an_attribute_is_visible(size):
    """Mean difference over the object's box, in grey levels, of any two looks of one object.

    The jitter of colours alone makes about 2.
    """
    looks = {}
    half = 7 if size == "small" else 10
    box = slice(32 - half, 32 + half)
    for shape, texture in itertools.product(vocab.SHAPES, vocab.TEXTURES):
        image = render(_one(shape=shape, texture=texture, size=size))
        looks[shape, texture] = image[box, box].astype(int)
    for a, b in itertools.combinations(looks, 2):
        assert np.abs(looks[a] - looks[b]).mean() > 4, (a, b)
    for a, b in itertools.combinations(vocab.COLOURS, 2):
        x, y = (render(_one(colour=c, size=size))[31, 31].astype(int) for c in (a, b))
        assert np.abs(x - y).max() > 45, (a, b)  # jitter moves each by at most 10


def test_pictures_are_antialiased_rgb():
    image = render(_one())
    assert image.shape == (64, 64, 3)
    assert image.dtype == np.uint8
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 5


def test_a_fading_background_goes_from_top_to_bottom():
    scene = _one()
    fading = Background(top="white", bottom="black", top_rgb=(240,) * 3, bottom_rgb=(20,) * 3)
    image = render(dataclasses.replace(scene, background=fading))
    assert (image[0] == 240).all()
    assert (image[-1] == 20).all()
    assert (np.diff(image[:, 0, 0].astype(int)) < 0).all()
