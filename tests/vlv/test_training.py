"""The training job on a tiny hub: what moves, what resumes, what the losses see."""

import dataclasses
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
from vlv_jax.inference import Autoencoder, Captioner
from vlv_jax.loading import Pieces, load_processor
from vlv_jax.training import build_job, make_record, train


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
    save_experiment(tmp_path, other)  # the twin
    assert (tmp_path / "experiment.json").read_bytes() != before


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
