"""`vlv_jax.reconstruct`: what is drawn, under which names, and what is refused."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from core_jax.config import ConfigError, to_dataclass
from core_jax.data.sources import SourceError
from vlv_jax.batches import views_of
from vlv_jax.experiment import Experiment
from vlv_jax.inference import Autoencoder
from vlv_jax.loading import load_networks
from vlv_jax.reconstruct import (
    Writer,
    compose_images,
    draw_all,
    draw_captions,
    list_images,
    load_autoencoder,
    load_embeddings,
    unique_names,
)
from vlv_jax.workdir import WorkdirError

NOTHING = {"input": None, "captions": None, "embeddings": None, "compose": None}


@pytest.fixture(scope="module")
def auto(tiny_hub) -> Autoencoder:
    """Untrained; batches of two, so that there are several."""
    experiment = to_dataclass(Experiment, tiny_hub.experiment())
    networks, params, pieces = load_networks(experiment.model)
    sampling = to_dataclass(
        type(experiment.sampling), tiny_hub.experiment()["sampling"] | {"batch_size": 2}
    )
    return Autoencoder(networks, params, pieces, views_of(experiment.data, pieces.processor),
                       sampling, experiment.data.limits)  # fmt: skip


@pytest.fixture
def pictures(tmp_path) -> pathlib.Path:
    rng = np.random.default_rng(0)
    folder = tmp_path / "in"
    (folder / "deeper").mkdir(parents=True)
    for name in ("b.png", "a.jpg", "deeper/b.png"):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save(folder / name)
    (folder / "deeper" / "broken.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("x")
    return folder


def test_images_and_their_embeddings_draw_the_same(auto, pictures, tmp_path):
    said: list[str] = []
    writer = Writer(tmp_path / "out", keep_embeddings=True)
    for drawn in draw_all(auto, NOTHING | {"input": [str(pictures)]}, said.append):
        writer.add(drawn)
    writer.close()
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"a.png", "b.png", "b-2.png", "sheet.png", "embeddings.npz"}
    assert len(said) == 1
    assert "broken.png" in said[0]
    file = tmp_path / "out" / "embeddings.npz"
    again = next(draw_all(auto, NOTHING | {"embeddings": str(file)}))
    assert list(again.names) == ["a", "b", "b-2"]
    for name, image in zip(again.names, again.images, strict=True):
        stored = np.asarray(Image.open(tmp_path / "out" / f"{name}.png"))
        np.testing.assert_array_equal(stored, image)
    assert not np.array_equal(again.images[0], again.images[1])


def test_pillow_images_are_read_as_their_files_are(auto, tmp_path):
    rgba = np.zeros((40, 50, 4), np.uint8)
    rgba[:20, :, 3] = 255
    Image.fromarray(rgba).save(tmp_path / "half.png")
    with Image.open(tmp_path / "half.png") as opened:
        z = auto.encode([opened, str(tmp_path / "half.png")])
    np.testing.assert_array_equal(z[0], z[1])
    black = auto.encode([rgba[..., :3]])
    assert np.abs(z[0] - black[0]).max() > 1e-4


def test_batches_are_as_large_as_asked(auto, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        "vlv_jax.inference.redraw_embeddings",
        lambda networks, params, z, *_, **__: sizes.append(len(z)) or np.zeros((len(z), 8, 8, 3)),
    )
    z = np.zeros((5, 4, 8), np.float32)
    assert len(auto.reconstruct(z)) == len(auto.reconstruct(z, batch_size=3)) == 5
    assert sizes == [2, 2, 2, 3, 3]
    with pytest.raises(ValueError, match="no images"):
        auto.encode([])
    with pytest.raises(ValueError, match="nothing to draw"):
        auto.reconstruct(z[:0])


def test_composition_takes_the_leading_embeddings(auto, pictures):
    first, second = str(pictures / "a.jpg"), str(pictures / "b.png")
    drawn = compose_images(auto, first, second, num_first=5, num_second=3)
    z = auto.encode([first, second])
    np.testing.assert_array_equal(drawn.embeddings[0], np.concatenate([z[0, :5], z[1, :3]]))
    assert list(drawn.names) == ["a-5-b-3"]
    assert drawn.images.shape == (1, 32, 32, 3)
    with pytest.raises(SourceError, match="no image file"):
        compose_images(auto, str(pictures), second, num_first=5, num_second=3)
    with pytest.raises(ValueError, match="takes"):
        compose_images(auto, first, second, num_first=60, num_second=60)
    with pytest.raises(ValueError, match="has 12 embeddings"):
        compose_images(auto, first, second, num_first=13, num_second=1)


def test_captions_are_drawn_by_their_ids(auto, tmp_path):
    file = tmp_path / "captions.jsonl"
    rows = [{"id": "x/one.png", "caption": "A red disc."}, {"id": "two", "error": "broken"},
            {"file_name": "three.jpg", "text": "A blue star."}]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    drawn = draw_captions(auto, file)
    assert list(drawn.names) == ["one", "three"]
    assert not np.array_equal(drawn.images[0], drawn.images[1])
    file.write_text('{"caption": "A red disc."}\n{"caption": \n')
    with pytest.raises(SourceError, match=r"captions\.jsonl:2: not valid JSON"):
        draw_captions(auto, file)
    file.write_text('{"id": "x"}\n')
    with pytest.raises(SourceError, match=r"captions\.jsonl:1"):
        draw_captions(auto, file)


def test_impossible_requests(auto, tmp_path, pictures):
    with pytest.raises(SourceError, match="one of"):
        list(draw_all(auto, NOTHING))
    with pytest.raises(SourceError, match="one of"):
        list(draw_all(auto, NOTHING | {"captions": "a", "embeddings": "b"}))
    with pytest.raises(SourceError, match="two images"):
        list(draw_all(auto, NOTHING | {"compose": ["a.png"]}))
    with pytest.raises(SourceError, match="neither"):
        list_images([str(tmp_path / "nothing")])
    bad = tmp_path / "bad.npz"
    np.savez(bad, z=np.zeros(3))
    with pytest.raises(SourceError, match="embeddings"):
        load_embeddings(bad, auto)
    np.savez(bad, embeddings=np.zeros((1, 4, 7), np.float32))
    with pytest.raises(SourceError, match=r"\[n, Q, 16\]"):
        load_embeddings(bad, auto)
    np.savez(bad, embeddings=np.array([{}], dtype=object))
    with pytest.raises(SourceError, match="plain arrays"):
        load_embeddings(bad, auto)
    with pytest.raises(WorkdirError, match="one directory"):
        load_autoencoder(None, None, None)


def test_names():
    assert unique_names(["a", "A", "a", "b c", ""]) == ["a", "A-2", "a-3", "b_c", "image"]


def test_the_sheet_overwrites_no_picture_and_a_file_is_drawn_once(pictures):
    assert unique_names(["sheet", "Sheet"]) == ["sheet-2", "Sheet-3"]
    (pictures / "circle").symlink_to(pictures)
    files = list_images([str(pictures / "b.png"), str(pictures), f"{pictures}/deeper/../b.png"])
    names = ["b.png", "a.jpg", "deeper/b.png", "deeper/broken.png"]
    assert files == [pictures / name for name in names]


def test_flags_change_sampling(tiny_hub, tmp_path, monkeypatch, auto):
    experiment = to_dataclass(Experiment, tiny_hub.experiment())
    from core_jax.train.workdir import save_experiment

    save_experiment(tmp_path, experiment)
    fresh = dataclasses.replace(auto)
    monkeypatch.setattr(Autoencoder, "from_pretrained", lambda path, experiment: fresh)
    changed = load_autoencoder(experiment, tmp_path, None, guidance=3.5, seed=None)
    assert changed.sampling.guidance == 3.5
    assert changed.sampling.seed == experiment.sampling.seed
    with pytest.raises(ConfigError):
        load_autoencoder(experiment, tmp_path, None, sampler="other")
