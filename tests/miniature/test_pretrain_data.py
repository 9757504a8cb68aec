import jax
import jax.numpy as jnp
import numpy as np
import pytest

from miniature.pretrain import labels
from miniature.pretrain.train_language_model import ANSWER_WEIGHT, _batch, _tokenize
from miniature.tokenizers import build_tokenizers
from miniature.world import vocabulary as vocab
from miniature.world.scenes import sample_scene

SCENES = [sample_scene(0, i, "train") for i in range(20)]


def test_labels_name_every_object():
    cells, backgrounds = labels.cell_labels(SCENES), labels.background_labels(SCENES)
    for row, edges, scene in zip(cells, backgrounds, SCENES, strict=True):
        assert (row[:, 0] > 0).sum() == len(scene.objects)
        for thing in scene.objects:
            shape, colour, size, texture = row[thing.cell]
            assert vocab.SHAPES[shape - 1] == thing.shape
            assert tuple(vocab.COLOURS)[colour] == thing.colour
            assert vocab.SIZES[size] == thing.size
            assert vocab.TEXTURES[texture] == thing.texture
        assert tuple(vocab.BACKGROUNDS)[edges[1]] == scene.background.bottom


@pytest.mark.parametrize("size", [3, 7, 8])
def test_cells_are_shares_of_the_grid(size):
    shares = labels._overlap(size)
    np.testing.assert_allclose(shares.sum(axis=1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(shares.sum(axis=0), 3 / size, rtol=1e-6)


def test_loss_ignores_what_is_not_told_and_sees_what_is():
    cells = jnp.asarray(labels.cell_labels(SCENES), jnp.int32)
    edges = jnp.asarray(labels.background_labels(SCENES), jnp.int32)
    probe = labels.GridProbe()
    params = labels.init_probe(probe, (8, 8, 16), jax.random.key(0))
    features = jax.random.normal(jax.random.key(1), (len(SCENES), 8, 8, 16))
    logits = probe.apply({"params": params}, features)
    loss = labels.probe_loss(logits, cells, edges)[0]
    everyone = jnp.ones(len(SCENES), bool)
    hidden = labels.hide_colours({"cells": cells, "backgrounds": edges}, everyone)
    without = labels.probe_loss(logits, **hidden)[0]
    assert float(without) < float(loss) - 2.0  # ln 8 for the colour, ln 5 for the background
    repainted = cells.at[..., 1].set((cells[..., 1] + 1) % len(vocab.COLOURS))
    again = labels.hide_colours({"cells": repainted, "backgrounds": edges}, everyone)
    assert labels.probe_loss(logits, **again)[0] == without
    assert labels.probe_loss(logits, repainted, edges)[0] != loss


def test_false_colours_keep_range_and_outline():
    images = (
        jnp.full((4, 8, 8, 3), 20, jnp.uint8)
        .at[:, 2:5, 2:5]
        .set(jnp.array([230, 30, 90], jnp.uint8))
    )
    mixed = labels.recolour(images, jax.random.key(0))
    assert mixed.min() >= -0.01
    assert mixed.max() <= 255.01
    for picture in np.asarray(mixed):
        assert len(np.unique(picture.reshape(-1, 3).round(2), axis=0)) == 2
    assert float(jnp.abs(mixed[0] - mixed[1]).max()) > 1


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(build_tokenizers(tmp_path_factory.mktemp("t"))["qwen2"])


def test_answers_weigh_most(tokenizer):
    ids, weights = _tokenize(tokenizer, [("Image: a. ", 1.0), ("Answer:", 0.2), (" red", 10.0)])
    assert tokenizer.decode([i for i, w in zip(ids, weights, strict=True) if w == 10.0]) == (
        " red" + tokenizer.eos_token
    )


@pytest.mark.parametrize(("reading", "share"), [(True, 0.25), (False, 5 / 12)])
def test_text_rows_are_functions_of_the_step(tokenizer, reading, share):
    first, again, other = (_batch(tokenizer, step, reading=reading) for step in (3, 3, 4))
    for name, rows in first.items():
        np.testing.assert_array_equal(rows, again[name])
        assert (rows != other[name]).any()
    asked = (first["weights"] == ANSWER_WEIGHT).any(axis=1)
    assert asked.mean() == pytest.approx(share)
    assert (first["weights"] == ANSWER_WEIGHT).sum() > 2 * asked.sum()
