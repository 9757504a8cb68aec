"""The training job on a tiny hub: what moves, what resumes, what the losses see."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from core_jax.config import to_dataclass
from core_jax.partition import flatten
from core_jax.train.errors import ResumeError
from core_jax.train.run_record import write_record
from core_jax.train.workdir import save_experiment
from vlv_jax import training
from vlv_jax.experiment import Experiment
from vlv_jax.exporting import Exportable, export_config
from vlv_jax.inference import Autoencoder, Captioner
from vlv_jax.loading import Pieces, load_processor
from vlv_jax.training import build_job, make_record, train
from vlv_jax.workdir import EXPORT_FILE, view_differences


def experiment(tiny_hub, **options) -> Experiment:
    return to_dataclass(Experiment, tiny_hub.experiment(**options))


def test_stage1_trains_exactly_the_paper_s_leaves(tiny_hub):
    job = build_job(experiment(tiny_hub))
    trained = set(flatten(job.state.params))
    assert all(
        n.startswith(("florence2/language_model/encoder/", "florence2/language_model/decoder/",
                      "bridge/")) for n in trained
    )  # fmt: skip
    for part in ("encoder", "decoder"):
        for leaf in ("embed_positions/embedding", "layernorm_embedding/scale"):
            assert f"florence2/language_model/{part}/{leaf}" in trained
    frozen = set(flatten(job.frozen))
    assert "florence2/language_model/shared/embedding" in frozen
    assert {n.split("/")[0] for n in frozen} == {"florence2", "text_encoder", "unet", "vae"}


def test_a_refused_config_leaves_the_run_as_it_was(tiny_hub, tmp_path, monkeypatch):
    """Before anything is loaded; what later commands read of the run is still the run's."""
    first = experiment(tiny_hub)
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    save_experiment(tmp_path, first)
    write_record(str(tmp_path), make_record(first), resumed_at=None)
    monkeypatch.setattr(training, "build_job", lambda _: pytest.fail("networks were loaded"))
    before = (tmp_path / "experiment.json").read_bytes()
    other = experiment(tiny_hub, seed=2)
    with pytest.raises(ResumeError, match=r"run\.seed: was 1, now 2"):
        train(other, tmp_path)
    assert (tmp_path / "experiment.json").read_bytes() == before
    data = dataclasses.replace(first.data, batch_size=16)
    with pytest.raises(ResumeError, match=r"data\.batch_size: was 8, now 16"):
        train(dataclasses.replace(first, data=data), tmp_path)
    save_experiment(tmp_path, other)  # the twin
    assert (tmp_path / "experiment.json").read_bytes() != before


class _LoadedError(Exception):
    """Stands for the heavy part of a start."""


@pytest.fixture
def second(tiny_hub, tmp_path, monkeypatch):
    """A stage-2 config that starts from a run of stage 1."""
    first = experiment(tiny_hub)
    save_experiment(tmp_path / "one", first)
    write_record(str(tmp_path / "one"), make_record(first), resumed_at=None)
    monkeypatch.setattr(training, "trained_params", lambda _: {})

    def build(_):
        raise _LoadedError

    monkeypatch.setattr(training, "build_job", build)
    return experiment(tiny_hub, stage=2, init_from=str(tmp_path / "one"))


def test_stage2_refuses_a_run_beside_other_hub_weights(tiny_hub, second, tmp_path):
    other = Path(shutil.copytree(tiny_hub.diffusion, tmp_path / "other-sd"))
    model = dataclasses.replace(second.model, diffusion=str(other))
    moved = dataclasses.replace(second, model=model)
    with pytest.raises(_LoadedError):  # the same bytes elsewhere are the same weights
        train(moved, tmp_path / "two")
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ResumeError) as info:
        train(moved, tmp_path / "two")
    assert f"diffusion: there {tiny_hub.diffusion} (hash " in str(info.value)
    assert f"here {other} (" in str(info.value)
    assert "florence2:" not in str(info.value)
    assert not (tmp_path / "two").exists()


def test_stage2_says_what_it_shows_otherwise_than_stage1(second, tmp_path, capsys):
    with pytest.raises(_LoadedError):
        train(second, tmp_path / "two")
    assert "warning" not in capsys.readouterr().out
    changed = dataclasses.replace(
        second,
        data=dataclasses.replace(second.data, image_size=64, crop="squash"),
        model=dataclasses.replace(second.model, task_prompt="What is it?"),
    )
    with pytest.raises(_LoadedError):
        train(changed, tmp_path / "two")
    said = capsys.readouterr().out
    assert said.count("warning") == 3
    assert "data.image_size: there 32, here 64" in said
    assert "data.crop: there 'center', here 'squash'" in said
    assert "model.task_prompt: there 'Describe" in said
    # A random crop in training is a draw of the same view.
    random = dataclasses.replace(second, data=dataclasses.replace(second.data, crop="random"))
    assert view_differences(random) == []


def test_an_export_says_what_it_was_shown(second, tmp_path):
    networks = SimpleNamespace(language_model=None, bridge=SimpleNamespace(num_queries=12))
    content = export_config(
        Exportable(experiment=second, networks=networks, params={}, origin="", facts={})
    )
    (tmp_path / EXPORT_FILE).write_text(json.dumps(content))
    run = dataclasses.replace(second.run, init_from=str(tmp_path))
    same = dataclasses.replace(second, run=run)
    assert view_differences(same) == []
    other = dataclasses.replace(same, data=dataclasses.replace(same.data, native_crops=True))
    assert view_differences(other) == ["data.native_crops: there False, here True"]


@pytest.mark.parametrize("broken", [False, True])
def test_a_run_is_told_which_images_were_skipped(tiny_hub, tmp_path, monkeypatch, broken):
    images = Path(shutil.copytree(tiny_hub.images, tmp_path / "images"))
    victim = min(p for p in images.iterdir() if p.suffix != ".jsonl")
    if broken:
        victim.write_bytes(b"")
    hub = dataclasses.replace(tiny_hub, images=str(images))
    taken = []
    monkeypatch.setattr(
        training, "run_training", lambda *_, make_batches, **__: taken.append(make_batches(0))
    )
    monkeypatch.setattr(training, "build_job", lambda _: SimpleNamespace(
        step_fn=None, state=None, frozen=None, sharding=None, networks=None,
        pieces=Pieces(load_processor(Path(hub.florence2)), None, None),
    ))  # fmt: skip
    train(experiment(hub), tmp_path / "run")
    for _ in range(2):  # ten images in batches of eight
        next(taken[0])
    assert list(taken[0].bad.ids.values()) == (["empty"] if broken else [])


@pytest.mark.slow
def test_both_stages_train_and_are_used(tiny_hub, tmp_path):
    first = experiment(tiny_hub, steps=3)
    before = flatten(build_job(first).state.params)
    result = train(first, tmp_path / "one")
    after = flatten(result.state.params)
    moved = [n for n in after if not np.array_equal(before[n], after[n])]
    # Key biases get no gradient (softmax is shift-invariant): everything else moves.
    assert len(moved) > 0.9 * len(after)
    second = experiment(tiny_hub, stage=2, steps=2, init_from=str(tmp_path / "one"))
    train(second, tmp_path / "two")
    pictures = sorted(p for p in Path(tiny_hub.images).iterdir() if p.suffix != ".jsonl")
    captions = Captioner.from_pretrained(tmp_path / "two").caption(pictures)
    assert len(captions) == 10
    auto = Autoencoder.from_pretrained(tmp_path / "two")
    z = auto.encode([np.zeros((40, 50, 3), np.uint8)])
    assert z.shape == (1, 12, 16)
    assert auto.reconstruct(z).shape == (1, 32, 32, 3)
    # The bridge of stage 1 is what stage 2 encodes with.
    trained_bridge = after["bridge/query_embed"]
    np.testing.assert_array_equal(auto.params["bridge"]["query_embed"], trained_bridge)
