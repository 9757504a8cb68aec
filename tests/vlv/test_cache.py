"""Cached features: the same batches and the same loss without the towers, and what is refused."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from core_jax.config import ConfigError, to_dataclass
from core_jax.data import pipeline
from core_jax.data.bad import TooManyBadExamples
from core_jax.data.images import BadImage
from core_jax.data.sources import open_source
from core_jax.partition import split
from vlv_jax import cache as cache_module
from vlv_jax import stage1
from vlv_jax.cache import build_cache
from vlv_jax.experiment import Experiment
from vlv_jax.feature_cache import (
    MANIFEST,
    CacheError,
    FeatureCache,
    Layout,
    shard_names,
    trained_towers,
)
from vlv_jax.loading import load_networks
from vlv_jax.training import _without_towers, make_loss, trainable_patterns, training_batches
from vlv_jax.workdir import EXPORT_FILE

BROKEN = 3
OPTIONS = {"examples_per_shard": 4, "batch_size": 4, "devices": jax.devices()[:1]}


@dataclasses.dataclass(frozen=True)
class World:
    """A folder with a broken image, its caches, and loaded networks."""

    raw: dict
    float32: pathlib.Path
    bfloat16: pathlib.Path
    networks: object
    params: dict
    pieces: object

    def experiment(self, **data) -> Experiment:
        return to_dataclass(Experiment, self.raw | {"data": self.raw["data"] | data})

    @functools.cached_property
    def loss(self):
        """Jitted once: where the data comes from is seen in the batch only."""
        return jax.jit(make_loss(self.experiment(), self.networks))


@pytest.fixture(scope="module")
def world(tiny_hub, tmp_path_factory):
    root = tmp_path_factory.mktemp("cache")
    shutil.copytree(tiny_hub.images, root / "images")
    raw = tiny_hub.experiment(stage=2) | {"captioning": {"reconstruction_weight": 1.0}}
    folder = root / "images"
    source = {"kind": "folder", "path": str(folder), "manifest": str(folder / "captions.jsonl")}
    raw["data"] = raw["data"] | {"source": source, "batch_size": 4}
    pictures = sorted(p for p in (root / "images").rglob("*") if p.suffix in (".png", ".jpg"))
    pictures[BROKEN].write_bytes(pictures[BROKEN].read_bytes()[:60])
    experiment = to_dataclass(Experiment, raw)
    for dtype in ("float32", "bfloat16"):
        missing = build_cache(experiment, root / dtype, dtype=dtype, **OPTIONS)
        assert missing == 0
    networks, params, pieces = load_networks(experiment.model)
    return World(raw, root / "float32", root / "bfloat16", networks, params, pieces)


def take(world, experiment, steps, start=0):
    with training_batches(experiment, world.pieces, start) as batches:
        return [next(batches) for _ in range(steps)]


def loss_of(world, experiment, batch):
    trainable, frozen = split(world.params, trainable_patterns(experiment))
    if experiment.data.cache:
        frozen = _without_towers(frozen, experiment)
    arrays = {k: v for k, v in batch.items() if k != "ids"}
    return float(world.loss(trainable, frozen, arrays, jax.random.key(3))[0])


def test_batches_are_those_without_a_cache_and_nothing_is_decoded(world, monkeypatch):
    plain = take(world, world.experiment(), 6)

    def decoding(*_):
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(pipeline, "decode_image", decoding)
    cached = take(world, world.experiment(cache=str(world.float32)), 6)
    for a, b in zip(plain, cached, strict=True):
        assert a["ids"] == b["ids"]
        for key in ("index", "tokens", "supervised"):
            np.testing.assert_array_equal(a[key], b[key])
        assert set(b) == {
            "ids", "index", "tokens", "supervised", "features", "latent_mean", "latent_logvar",
        }  # fmt: skip
    # The broken image was met (two epochs and more) and replaced in both.
    ids = [i for batch in plain for i in batch["ids"]]
    assert len(set(ids)) == 9
    assert [b["ids"] for b in take(world, world.experiment(cache=str(world.float32)), 2, 4)] == [
        b["ids"] for b in plain[4:]
    ]


def test_the_loss_is_the_same(world):
    """Relative: float32 features 1e-6 (equal when measured), bfloat16 ones 1e-5 (4e-6 measured)."""
    (batch,) = take(world, world.experiment(), 1)
    experiment = world.experiment(cache=str(world.float32))
    (cached,) = take(world, experiment, 1)
    expected = loss_of(world, world.experiment(), batch)

    def error(rows):
        return abs(loss_of(world, experiment, rows) - expected) / expected

    assert error(cached) < 1e-6
    (half,) = take(world, world.experiment(cache=str(world.bfloat16)), 1)
    assert half["features"].dtype == np.float32  # as the frozen networks are held
    assert not np.array_equal(half["features"], cached["features"])
    np.testing.assert_allclose(half["features"], cached["features"], rtol=2**-8, atol=1e-30)
    assert error(half) < 1e-5
    # The twins: the latents, the features of other images.
    moved = {k: np.roll(cached[k], 1, axis=0) for k in ("latent_mean", "features")}
    assert error(cached | {"latent_mean": moved["latent_mean"]}) > 1e-4
    assert error(cached | {"features": moved["features"]}) > 1e-3


def test_a_caption_only_loss_reads_no_moments(world):
    raw = {k: v for k, v in world.raw.items() if k != "captioning"}
    raw["data"] = raw["data"] | {"cache": str(world.float32)}
    (batch,) = take(world, to_dataclass(Experiment, raw), 1)
    assert set(batch) == {"ids", "index", "tokens", "supervised", "features"}


def test_lookups(world):
    cache = FeatureCache(world.float32)
    assert len(cache) == 9
    listing = json.loads((world.float32 / shard_names(0, 3)[1]).read_text())
    assert len(listing["ids"]) == 3
    with pytest.raises(BadImage, match=r"truncated|broken"):
        cache.get(next(iter(listing["bad"])))
    arrays = cache.get(listing["ids"][1])
    assert arrays["features"].shape == cache.layout.features
    assert np.isfinite(arrays["latent_logvar"]).all()
    with pytest.raises(CacheError, match=r"'new\.png' is not in the cache"):
        cache.get("new.png")


def test_layout_round_trip():
    layout = Layout((3, 2), (2, 2, 1), "bfloat16")
    rng = np.random.default_rng(0)
    arrays = {
        "features": rng.normal(size=(3, 2)).astype(jax.numpy.bfloat16),
        "latent_mean": rng.normal(size=(2, 2, 1)).astype(np.float32),
        "latent_logvar": rng.normal(size=(2, 2, 1)).astype(np.float32),
    }
    record = layout.pack("bird é/1", arrays)
    name, back = layout.unpack(record)
    assert name == "bird é/1"
    for key, value in arrays.items():
        np.testing.assert_array_equal(back[key], value)
    with pytest.raises(CacheError, match="bytes"):
        layout.unpack(record[:-1])
    with pytest.raises(ValueError, match="features is float32"):
        layout.pack("a", arrays | {"features": arrays["features"].astype(np.float32)})


@pytest.mark.parametrize(
    ("change", "named"),
    [({"image_size": 64}, "image_size"), ({"crop": "squash"}, "crop"),
     ({"resample": "bicubic"}, "resample"), ({"source": {"kind": "folder", "path": "x"}}, "source"),
     ({"limits": {"min_side": 8}}, "limits.min_side")],
)  # fmt: skip
def test_a_cache_of_something_else_is_refused(world, change, named):
    experiment = world.experiment(cache=str(world.float32), **change)
    with pytest.raises(CacheError, match=rf"{named}.*the run"):
        FeatureCache(world.float32).check(experiment, world.pieces.processor)


def test_other_weights_are_refused(world, tmp_path):
    experiment = world.experiment(cache=str(world.float32))
    cache = FeatureCache(world.float32)
    cache.check(experiment, world.pieces.processor)
    shutil.copytree(pathlib.Path(experiment.model.diffusion) / "vae", tmp_path / "vae")
    weights = next((tmp_path / "vae").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    model = dataclasses.replace(experiment.model, diffusion=str(tmp_path))
    with pytest.raises(CacheError, match=r"weights\.vae"):
        cache.check(dataclasses.replace(experiment, model=model), world.pieces.processor)


def test_trained_towers_are_refused(world):
    frozen = json.loads((world.float32 / MANIFEST).read_text())["frozen"]
    experiment = world.experiment(cache=str(world.float32))
    assert frozen
    assert not trained_towers(dataclasses.replace(experiment, trainable=stage1.TRAINABLE), frozen)
    experiment = dataclasses.replace(experiment, trainable=("florence2/.*",))
    with pytest.raises(CacheError, match="frozen towers"):
        FeatureCache(world.float32).check(experiment, world.pieces.processor)


def test_towers_that_an_export_holds_otherwise_are_refused(world, tmp_path):
    frozen = json.loads((world.float32 / MANIFEST).read_text())["frozen"]
    experiment = world.experiment(cache=str(world.float32))
    shutil.copytree(experiment.model.florence2, tmp_path / "florence2")
    (tmp_path / EXPORT_FILE).write_text("{}")
    run = dataclasses.replace(experiment.run, init_from=str(tmp_path))
    experiment = dataclasses.replace(experiment, run=run)
    assert trained_towers(experiment, frozen) == []
    file = tmp_path / "florence2" / "model.safetensors"
    tensors = load_file(file)
    language, tower = (next(n for n in sorted(tensors) if p in n)
                       for p in ("decoder", "vision_tower"))  # fmt: skip
    tensors[language] = tensors[language] + 1
    save_file(tensors, file, {"format": "pt"})
    assert trained_towers(experiment, frozen) == []  # stage 1 trains it
    tensors[tower] = tensors[tower] + 1
    save_file(tensors, file, {"format": "pt"})
    (found,) = trained_towers(experiment, frozen)
    assert found.startswith("florence2/vision_tower/")
    with pytest.raises(CacheError, match=f"export before it, changes {found}"):
        FeatureCache(world.float32).check(experiment, world.pieces.processor)


@pytest.mark.parametrize("place", ["ids", "bad"])
def test_an_id_in_two_shards_is_refused(world, tmp_path, place):
    cache = shutil.copytree(world.float32, tmp_path / "cache")
    assert len(FeatureCache(cache)) == 9  # the control
    listing = cache / shard_names(1, 3)[1]
    repeated = json.loads((cache / shard_names(0, 3)[1]).read_text())["ids"][0]
    entry = json.loads(listing.read_text())
    if place == "ids":
        entry["ids"][-1] = repeated
    else:
        entry["bad"][repeated] = "truncated"
    listing.write_text(json.dumps(entry))
    with pytest.raises(CacheError, match=f"two examples of the source have the id '{repeated}'"):
        FeatureCache(cache)


def test_an_id_that_repeats_in_a_source_is_refused(world, tmp_path, monkeypatch):
    class Repeating:
        def __init__(self, spec):
            self.source = open_source(spec)

        def __len__(self):
            return len(self.source)

        def __getitem__(self, index):
            return dataclasses.replace(self.source[index], id=f"{index % repeat}.png")

    monkeypatch.setattr(cache_module, "open_source", Repeating)
    for repeat, within in ((2, True), (5, False)):  # in one shard, in two of them
        out = tmp_path / str(repeat)
        with pytest.raises(CacheError, match="two examples of the source have the id '"):
            build_cache(world.experiment(), out, **OPTIONS)
        assert len(list(out.glob("*.array_record"))) == (0 if within else 3)


def test_random_crops_are_refused(world, tmp_path):
    with pytest.raises(CacheError, match="fixed crop"):
        build_cache(world.experiment(crop="random"), tmp_path)
    with pytest.raises(ConfigError, match="fixed crop"):
        world.experiment(crop="random", cache="x")


def test_a_killed_job_goes_on_where_it_stopped(world, tmp_path, monkeypatch, capsys):
    options = OPTIONS | {"dtype": "float32"}
    real, written = cache_module._write_shard, []

    def dying(out, files, *rest):
        if len(written) == 1:
            (out / files[0]).write_bytes(b"half")  # records without their list do not count
            raise KeyboardInterrupt
        written.append(files)
        real(out, files, *rest)

    monkeypatch.setattr(cache_module, "_write_shard", dying)
    with pytest.raises(KeyboardInterrupt):
        build_cache(world.experiment(), tmp_path, **options)
    with pytest.raises(CacheError, match="2 of 3 shards are missing"):
        FeatureCache(tmp_path)
    monkeypatch.setattr(
        cache_module, "_write_shard", lambda o, f, *r: written.append(f) or real(o, f, *r)
    )
    real_towers, meshes = cache_module.encode_views, []
    monkeypatch.setattr(
        cache_module, "encode_views",
        lambda *args: meshes.append(jax.sharding.get_abstract_mesh()) or real_towers(*args),
    )  # fmt: skip
    assert build_cache(world.experiment(), tmp_path, **options) == 0
    assert meshes[-1].axis_names == ("data",)  # fused attention needs to see it
    assert written == [shard_names(s, 3) for s in range(3)]
    assert build_cache(world.experiment(), tmp_path, **options) == 0  # nothing to do
    assert len(written) == 3
    a, b = FeatureCache(tmp_path), FeatureCache(world.float32)
    for name in json.loads((tmp_path / shard_names(2, 3)[1]).read_text())["ids"]:
        for key, value in b.get(name).items():
            np.testing.assert_array_equal(a.get(name)[key], value)
    with pytest.raises(CacheError, match="dtype"):
        build_cache(world.experiment(), tmp_path, **options | {"dtype": "bfloat16"})
    assert "images/s" in capsys.readouterr().out


DAMAGE = {
    "cut short": lambda records, listing: os.truncate(records, records.stat().st_size // 2),
    "records gone": lambda records, listing: records.unlink(),
    "list torn": lambda records, listing: listing.write_text('{"ids": ["a'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_is_named_and_made_anew(world, tmp_path, damage, capsys):
    out, options = tmp_path / "out", OPTIONS | {"dtype": "float32"}
    shutil.copytree(world.float32, out)
    files = [out / name for name in shard_names(1, 3)]
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / f".{files[0].name}.0123456789ab.tmp").touch()  # of a process that was killed
    DAMAGE[damage](*files)
    with pytest.raises(CacheError, match=r"1 of 3 shards are missing or damaged \(features-00001"):
        FeatureCache(out)
    assert build_cache(world.experiment(), out, **options) == 0
    assert "the shard is made anew" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole


def test_processes_share_the_shards(world, tmp_path):
    options = OPTIONS | {"dtype": "float32", "process_count": 2}
    places = []
    told = options | {"at": places.append}
    assert build_cache(world.experiment(), tmp_path, process_index=1, **told) == 2
    assert re.fullmatch(r"image (\d+) of \1", places[-1])  # all of its own
    assert build_cache(world.experiment(), tmp_path, process_index=0, **options) == 0
    assert len(FeatureCache(tmp_path)) == 9


def test_too_many_bad_images_stop_the_job(world, tmp_path, monkeypatch):
    policy = dataclasses.replace(
        cache_module.policy_of(world.experiment().data, require_caption=False), min_seen=5
    )
    monkeypatch.setattr(cache_module, "policy_of", lambda *_, **__: policy)
    with pytest.raises(TooManyBadExamples):
        build_cache(world.experiment(), tmp_path, **OPTIONS | {"examples_per_shard": 16})
    assert [p.name for p in tmp_path.iterdir()] == [MANIFEST]  # no half shard


@pytest.mark.slow
def test_training_from_a_cache_equals_training_from_images(world, tmp_path):
    from vlv_jax.training import build_job, train

    raw = {k: v for k, v in world.raw.items() if k != "captioning"} | {"stage": 1}
    raw["model"] = raw["model"] | {"language_model": ""}
    raw["data"] = raw["data"] | {"batch_size": 8}
    plain = to_dataclass(Experiment, raw)
    cached = to_dataclass(Experiment, raw | {"data": raw["data"] | {"cache": str(world.float32)}})
    assert "vae" in build_job(plain).frozen
    job = build_job(cached)
    assert "vae" not in job.frozen
    assert set(job.frozen["florence2"]) == {"language_model"}
    for name, experiment in (("a", plain), ("b", cached)):
        train(experiment, tmp_path / name)
    logged = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()] for name in "ab"
    ]
    assert len(logged[0]) == 2
    for a, b in zip(*logged, strict=True):
        # Parameters are no measure: Adam turns the sign of a rounding error into a whole step.
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
