"""The caption command on a tiny hub: errors, resuming, sampling, texts beside images."""

import dataclasses
import json
import os
import pathlib
import shutil
import tarfile

import jax
import jax.numpy as jnp
import pytest

from core_jax.config import ConfigError, to_dataclass
from core_jax.data.sources import SourceError
from vlv_jax import caption
from vlv_jax.batches import sample_index, views_of
from vlv_jax.caption import CaptionJob, caption_inputs, load_captioner
from vlv_jax.experiment import Experiment
from vlv_jax.inference import Captioner
from vlv_jax.loading import load_networks
from vlv_jax.workdir import WorkdirError


@pytest.fixture(scope="module")
def captioner(tiny_hub):
    experiment = to_dataclass(Experiment, tiny_hub.experiment(stage=2))
    networks, params, pieces = load_networks(experiment.model, with_decoder=False)
    return Captioner(
        networks, params, pieces, views_of(experiment.data, pieces.processor),
        dataclasses.replace(experiment.sampling, temperature=1.0), experiment.data.limits,
    )  # fmt: skip


@pytest.fixture
def images(tiny_hub, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    everything = sorted(pathlib.Path(tiny_hub.images).rglob("*"))
    found = [file for file in everything if file.suffix in (".png", ".jpg")]
    for number, file in enumerate(found[:6]):
        shutil.copy(file, folder / f"{number}{file.suffix}")
    (folder / "2b.jpg").write_bytes(b"not a picture")
    return folder


def run(captioner, images, out, *, at=lambda place: None, **changes):
    job = CaptionJob(inputs=[str(images)], output=out, num_threads=2, **changes)
    path = caption_inputs(captioner, job, at=at)
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_image_gets_a_record_in_order(captioner, images, tmp_path, capsys):
    places = []
    records = run(captioner, images, tmp_path / "out" / "c.jsonl", at=places.append)
    assert len(places) > 1
    assert places[-1] == "image 7 of 7"
    assert [r["id"] for r in records] == sorted(str(p) for p in images.iterdir())
    bad = [r for r in records if "error" in r]
    assert [(r["id"], r["error"]) for r in bad] == [(f"{images}/2b.jpg", "not_an_image")]
    good = [r for r in records if "caption" in r]
    assert all(
        set(r) == {"id", "file_name", "caption", "finished", "num_tokens"} for r in good
    )  # fmt: skip
    assert all(1 <= r["num_tokens"] <= 8 for r in good)
    assert len({r["caption"] for r in good}) > 1
    printed = capsys.readouterr().out
    assert "images/s" in printed
    assert "1 images could not be used" in printed


def test_sampled_captions_depend_on_neither_batch_nor_kill(captioner, images, tmp_path):
    whole = run(captioner, images, tmp_path / "a.jsonl")
    lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    # Killed after the second image, in the middle of a line; now 2.* opens a batch.
    (tmp_path / "b.jsonl").write_text("".join(lines[:2]) + lines[2][:9])
    assert run(captioner, images, tmp_path / "b.jsonl") == whole
    alone = run(captioner, images / "4.jpg" if (images / "4.jpg").exists() else images / "4.png",
                tmp_path / "c.jsonl")  # fmt: skip
    assert alone[0] in whole
    # The twin: another seed gives other captions.
    captioner = dataclasses.replace(
        captioner, sampling=dataclasses.replace(captioner.sampling, seed=5)
    )
    assert run(captioner, images, tmp_path / "d.jsonl") != whole
    # Captions of two settings are not mixed in one file, unless all are made anew.
    with pytest.raises(SourceError, match=r"a\.jsonl was begun with other settings: seed was"):
        run(captioner, images, tmp_path / "a.jsonl")
    assert run(captioner, images, tmp_path / "a.jsonl", overwrite="replace") != whole


def test_everything_that_decides_on_captions_is_noted(captioner, images, tmp_path):
    out = tmp_path / "c.jsonl"
    run(captioner, images, out)
    views, limits = captioner.views, captioner.limits
    halved = jax.tree.map(lambda x: x.astype(jnp.bfloat16), captioner.params["language_model"])
    small = dataclasses.replace(views.processor, size=(48, 48))
    for name, changes in {
        "dtype": {"params": captioner.params | {"language_model": halved}},
        "prompt_ids": {"networks": dataclasses.replace(captioner.networks, prompt_ids=(0, 2))},
        r"views\.crop": {"views": dataclasses.replace(views, crop="squash")},
        r"processor\.size": {"views": dataclasses.replace(views, processor=small)},
        r"limits\.max_pixels": {"limits": dataclasses.replace(limits, max_pixels=10**6)},
    }.items():
        with pytest.raises(SourceError, match=f"other settings: {name} was"):
            run(dataclasses.replace(captioner, **changes), images, out)
    other = dataclasses.replace(captioner.sampling, batch_size=3)
    run(dataclasses.replace(captioner, sampling=other), images, out)


def test_what_the_output_has_is_skipped_or_replaced(captioner, images, tmp_path, monkeypatch):
    out = tmp_path / "c.jsonl"
    old = {"id": sorted(str(p) for p in images.iterdir())[0], "caption": "kept"}
    out.write_text(json.dumps(old) + "\n")
    records = run(captioner, images, out)
    assert records[0] == old
    assert len(records) == 7
    calls = []
    monkeypatch.setattr(
        Captioner, "caption_views", lambda self, views, **_: calls.append(len(views))
    )
    assert run(captioner, images, out) == records
    assert not calls  # nothing left to do
    monkeypatch.undo()
    # A replacement that dies leaves the old output; the same command goes on with its part.
    real, count = caption._records, iter(range(9))

    def dying(*args):
        if next(count):
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(caption, "_records", dying)
    with pytest.raises(KeyboardInterrupt):
        run(captioner, images, out, overwrite="replace")
    assert json.loads(out.read_text().splitlines()[0]) == old
    other = dataclasses.replace(captioner.sampling, seed=5)
    with pytest.raises(KeyboardInterrupt):
        run(dataclasses.replace(captioner, sampling=other), images, out, overwrite="replace")
    with pytest.raises(SourceError, match="seed was"):  # the old captions are not its own
        run(dataclasses.replace(captioner, sampling=other), images, out)
    sizes = []
    monkeypatch.setattr(caption, "_records", lambda c, b: sizes.append(len(b)) or real(c, b))
    replaced = run(captioner, images, out, overwrite="replace")
    assert sum(sizes) == 2  # the first block was 4 usable images and a broken one
    assert replaced[0] != old
    assert [r["id"] for r in replaced] == [r["id"] for r in records]
    assert len(list(tmp_path.glob("*.partial"))) == 1  # of the other seed
    assert run(captioner, images, out) == replaced


def test_errors_are_tried_again(captioner, images, tmp_path):
    out = tmp_path / "c.jsonl"
    records = run(captioner, images, out)
    place = next(i for i, r in enumerate(records) if "error" in r)
    assert run(captioner, images, out) == records  # still broken: nothing is written
    shutil.copy(records[0]["file_name"], images / "2b.jpg")
    mended = run(captioner, images, out)
    assert "caption" in mended[place]
    assert [r for r in mended if r["id"] != records[place]["id"]] == [
        r for r in records if "error" not in r
    ]
    assert run(captioner, images, out) == mended
    # Killed before the old error was taken out.
    out.write_text("".join(json.dumps(r) + "\n" for r in [records[place], *mended]))
    assert [r["id"] for r in run(captioner, images, out)].count(records[place]["id"]) == 1


def test_a_broken_tar_does_not_end_the_job(captioner, images, tmp_path, capsys):
    out, whole = tmp_path / "c.jsonl", tmp_path / "whole.tar"
    with tarfile.open(whole, "w") as tar:
        for file in sorted(images.glob("[0-2].*")):
            tar.add(file, file.name)
    (images / "broken.tar").write_bytes(whole.read_bytes()[:900])
    with tarfile.open(images / "empty.tar", "w"):
        pass
    records = {r["id"]: r.get("error") for r in run(captioner, images, out)}
    assert len(records) == 9
    assert records[f"{images}/broken.tar"] == "unreadable_tar"
    assert records[f"{images}/empty.tar"] == "empty_tar"
    printed = capsys.readouterr().out
    assert "2 tars cannot be read" in printed
    assert "broken.tar" in printed
    shutil.copy(whole, images / "broken.tar")
    records = {r["id"]: r.get("error") for r in run(captioner, images, out)}
    assert len(records) == 11
    assert f"{images}/broken.tar" not in records
    assert records[f"{images}/broken.tar/0"] is None


def text_beside(folder: pathlib.Path, name: str) -> str:
    """As written: random weights may say "\\r", which `read_text` would turn into "\\n"."""
    return (folder / f"{name}.txt").read_bytes().decode()


def test_texts_beside_images(captioner, images, tmp_path):
    names = sorted(p.stem for p in images.iterdir() if p.stem != "2b")
    (images / f"{names[0]}.txt").write_text("mine\n")
    records = run(captioner, images, tmp_path / "c.jsonl")
    assert len(list(images.glob("*.txt"))) == 1
    run(captioner, images, tmp_path / "c.jsonl", sidecar=True)  # completes from the output
    captions = {r["file_name"].rsplit("/", 1)[1].split(".")[0]: r.get("caption") for r in records}
    for name in names[1:]:
        assert text_beside(images, name) == captions[name] + "\n"
    assert text_beside(images, names[0]) == "mine\n"
    assert not (images / "2b.txt").exists()
    run(captioner, images, tmp_path / "c.jsonl", sidecar=True, overwrite="replace")
    assert text_beside(images, names[0]) == captions[names[0]] + "\n"
    manifest = images / f"{names[0]}.txt"
    manifest.write_text(next(p.name for p in images.iterdir() if p.suffix != ".txt"))
    if (images / manifest.read_text()).stem == names[0]:
        with pytest.raises(SourceError, match="over --input"):
            run(captioner, manifest, tmp_path / "x.jsonl", sidecar=True)


def test_names_that_are_not_utf8(captioner, images, tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    shutil.copy(next(images.glob("*.png")), images / name)
    records = run(captioner, images / name, tmp_path / "c.jsonl")
    assert "caption" in records[0]
    assert run(captioner, images / name, tmp_path / "c.jsonl") == records
    assert sample_index(name) != sample_index("caf.png")


def test_processes_share_the_images(captioner, images, tmp_path):
    whole = run(captioner, images, tmp_path / "a.jsonl")
    parts = [
        run(captioner, images, tmp_path / "b.jsonl", process_index=i, process_count=2)
        for i in (0, 1)
    ]
    assert parts == [whole[0::2], whole[1::2]]


def test_one_directory_is_named(tmp_path):
    for workdir, source in ((None, None), (tmp_path, str(tmp_path))):
        with pytest.raises(WorkdirError, match="--workdir RUN, or --from"):
            load_captioner(None, workdir, source)
    with pytest.raises(WorkdirError, match=r"experiment\.json"):
        load_captioner(None, tmp_path, None)


@pytest.mark.slow
def test_a_run_is_loaded_and_settings_are_changed(tiny_hub, tmp_path):
    from vlv_jax.training import train

    raw = tiny_hub.experiment(stage=2, steps=1)
    manifest = f"{tiny_hub.images}/captions.jsonl"
    raw["data"]["source"] = {"kind": "folder", "path": tiny_hub.images, "manifest": manifest}
    experiment = to_dataclass(Experiment, raw)
    train(experiment, tmp_path / "run")
    loaded = load_captioner(None, tmp_path / "run", None, num_beams=2, batch_size=2)
    assert (loaded.sampling.num_beams, loaded.sampling.max_new_tokens) == (2, 8)
    records = run(loaded, tiny_hub.images, tmp_path / "c.jsonl")
    assert len(records) == 10
    with pytest.raises(ConfigError, match="exclude each other"):
        load_captioner(experiment, tmp_path / "run", None, num_beams=2, temperature=0.5)
