"""The vision-language stand-ins in training see and read what they will see when they are used."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from core_jax.decode.frontends import Gemma3Frontend, Qwen2_5_VLFrontend
from core_jax.ops.execution import Execution
from miniature import standins
from miniature.pretrain import readers
from miniature.pretrain.readers import Gemma3Reader, Qwen2_5_VLReader
from miniature.pretrain.train_target import LENGTH, _conversations
from miniature.tokenizers import build_tokenizers
from miniature.world import render, sample_scene
from miniature.world.dialogues import description, interview

SCENES = [sample_scene(0, i, "train") for i in range(3)]
QUESTION = "What is in the picture?"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return build_tokenizers(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module", params=["qwen", "gemma"])
def trained(request, tokenizers):
    """(reader, parameters, frontend) of the architecture at random."""
    qwen = request.param == "qwen"
    maker, name = (Qwen2_5_VLReader, "qwen2-chat") if qwen else (Gemma3Reader, "gemma3")
    reader = maker.make(tokenizers[name])
    reader = dataclasses.replace(reader, model=reader.model.clone(execution=Execution()))
    params = reader.family.init_params(reader.model, jax.random.key(0))
    frontend = (Qwen2_5_VLFrontend if qwen else Gemma3Frontend)(reader.processor)
    return reader, params, frontend


def _by_pillow(pixels, preprocessor):
    """`enlarged` as the image processors do it."""
    side = standins.TARGET_IMAGE_SIZE
    pictures = [
        Image.fromarray(x).resize((side, side), preprocessor["resample"])
        for x in np.asarray(pixels, np.uint8)
    ]
    x = np.stack(pictures).astype(np.float32) / 255.0
    mean, std = (np.float32(preprocessor[name]) for name in ("image_mean", "image_std"))
    return jnp.asarray((x - mean) / std)


@pytest.mark.parametrize("reader", [Qwen2_5_VLReader, Gemma3Reader])
def test_pictures_are_enlarged_as_pillow_does(reader):
    pictures = np.stack([render(scene) for scene in SCENES])
    levels = 255 * np.float32(reader.preprocessor["image_std"])
    got = np.asarray(readers.enlarged(jnp.asarray(pictures), reader.preprocessor)) * levels
    wanted = np.asarray(_by_pillow(pictures, reader.preprocessor)) * levels
    assert np.abs(got - wanted).max() < 1.01  # one level of 256, where it rounds otherwise
    assert np.abs(got - wanted).mean() < 0.1


def test_logits_are_those_of_the_processors_inputs(trained, monkeypatch):
    reader, params, frontend = trained
    # A patch of plain grey has next to no values, and a layer norm makes much of one level there.
    monkeypatch.setattr(readers, "enlarged", lambda pixels, preprocessor: enlarged)
    pictures = np.stack([render(scene) for scene in SCENES])
    enlarged = _by_pillow(pictures, reader.preprocessor)
    answers = [interview(scene, 0, turns=1) for scene in SCENES]
    rows = [reader.tokens([(QUESTION, answer)]) for ((_, answer),) in answers]
    ids = np.full((3, LENGTH), reader.processor.tokenizer.pad_token_id, np.int32)
    valid = np.zeros(ids.shape, bool)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)], valid[i, : len(row.ids)] = row.ids, True

    @jax.jit
    def ours(params, pictures, batch):
        return reader.logits(params, reader.features(params, pictures), batch)

    batch = {"tokens": ids, **reader.places(ids, valid)}
    got = ours(params, jnp.asarray(pictures), jax.tree.map(jnp.asarray, batch))
    texts = [frontend.render(QUESTION, 1)] * 3
    images = [[Image.fromarray(picture)] for picture in pictures]
    wanted = _of_processor(reader, params, texts, images)
    n = wanted.shape[1]
    prompt = rows[0].ids[:n]
    assert all((row.ids[:n] == prompt).all() for row in rows)
    scale = np.abs(wanted).max()
    assert np.abs(np.asarray(got[:, :n]) - wanted).max() < 1e-4 * scale
    swapped = _of_processor(reader, params, texts, images[1:] + images[:1])
    assert np.abs(swapped - wanted).max() > 0.1 * scale


def _of_processor(reader, params, texts, images):
    made = reader.processor(texts, images)
    if isinstance(reader, Qwen2_5_VLReader):
        batch, places = made.images.batch, made.places
        inputs = (
            made.ids, places.positions, places.image_slots, batch.patches, batch.positions,
            batch.segments,
        )  # fmt: skip
    else:
        inputs = (made.ids, made.pixel_values[:, 0])
    assert made.valid.all()
    return np.asarray(jax.jit(reader.model.apply)({"params": params}, *map(jnp.asarray, inputs)))


def test_rows_hold_whole_conversations(trained):
    reader = trained[0]
    longest = 0
    for i in range(60):
        scene = sample_scene(0, i, "train")
        for turns in (description(scene, i), interview(scene, i)):
            longest = max(longest, len(reader.tokens(turns).ids))
    assert longest <= LENGTH
    made = _conversations(reader, SCENES, np.random.default_rng(0))
    learned = made["weights"] > 0
    tokenizer = reader.processor.tokenizer
    text = tokenizer.decode(made["tokens"][0][learned[0]], skip_special_tokens=True)
    assert all(o.colour in text for o in SCENES[0].objects)
    assert set(np.unique(made["weights"])) == {0.0, 1.0, 3.0}
