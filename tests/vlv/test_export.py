"""An exported directory stands for the run it was made from, here and in PyTorch's libraries."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_jax.config import to_dataclass
from core_jax.models import load_model
from core_jax.partition import flatten
from vlv_jax import networks as names
from vlv_jax.experiment import Experiment
from vlv_jax.exporting import Exportable, write_export
from vlv_jax.inference import Autoencoder, Captioner
from vlv_jax.loading import load_networks
from vlv_jax.model_card import metrics_of, model_card
from vlv_jax.reconstruct import load_autoencoder
from vlv_jax.workdir import WorkdirError, assemble

REPORT = {
    "report": {"title": "x"},
    "vlv": {"caption": {"object_f1": {"value": 0.5, "n": 6, "interval": [0.25, 0.75]}}},
}


def perturbed(tree, seed):
    """As if trained: every leaf moved, so that a file left from the hub would be seen."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: x + jnp.asarray(0.02 * rng.standard_normal(x.shape), x.dtype), tree
    )


@pytest.fixture(scope="module")
def model(tiny_hub) -> Exportable:
    experiment = to_dataclass(Experiment, tiny_hub.experiment(stage=2))
    networks, params, _ = load_networks(experiment.model)
    params |= {
        n: perturbed(params[n], i)
        for i, n in enumerate((names.BRIDGE, names.PROJECTOR, names.FLORENCE2,
                               names.LANGUAGE_MODEL))
    }  # fmt: skip
    return Exportable(experiment=experiment, networks=networks, params=params,
                      origin="Test.", facts={"step": 7})  # fmt: skip


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("out") / "model"
    write_export(model, out, report=REPORT)
    return out


def test_every_tensor_comes_back_bitwise(model, exported):
    loaded = Autoencoder.from_pretrained(exported)
    captioner = Captioner.from_pretrained(exported)
    found = flatten(loaded.params) | flatten(captioner.params)
    wanted = flatten(model.params)
    assert found.keys() == wanted.keys()
    for name, leaf in wanted.items():
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(leaf), err_msg=name)
    assert loaded.networks == dataclasses.replace(
        model.networks, projector=None, language_model=None
    )
    assert captioner.sampling == model.experiment.sampling
    assert captioner.views.size == model.experiment.data.image_size


def test_layout_and_card(model, exported):
    files = {p.relative_to(exported).as_posix() for p in exported.rglob("*") if p.is_file()}
    assert {
        "vlv_config.json", "vlv.safetensors", "README.md", "florence2/model.safetensors",
        "florence2/preprocessor_config.json", "florence2/tokenizer.json",
        "stable-diffusion/model_index.json", "stable-diffusion/tokenizer/tokenizer.json",
        "stable-diffusion/scheduler/scheduler_config.json",
        "stable-diffusion/unet/diffusion_pytorch_model.safetensors",
        "stable-diffusion/vae/diffusion_pytorch_model.safetensors",
        "stable-diffusion/text_encoder/model.safetensors",
        "language_model/model.safetensors", "language_model/tokenizer.json",
    } <= files  # fmt: skip
    card = (exported / "README.md").read_text()
    assert "vlv.caption.object_f1 | 0.5 | 0.25 to 0.75 | 6" in card
    assert "| step | 7 |" in card
    assert "Research License" in card
    assert "RAIL" in card
    models, _ = load_model(exported / "stable-diffusion")
    assert set(models) == {"text_encoder", "unet", "vae"}
    assert dict(metrics_of(REPORT))["vlv.caption.object_f1"]["n"] == 6
    stage1 = dataclasses.replace(model.experiment, stage=1)
    plain = model_card(stage1, has_language_model=False, origin="", facts={}, report={})
    assert "Research License" not in plain
    assert "Nothing yet" in plain


def test_only_an_export_is_replaced(model, exported, tmp_path):
    (tmp_path / "precious").write_text("x")
    with pytest.raises(WorkdirError, match="no export"):
        write_export(model, tmp_path)
    assert (tmp_path / "precious").exists()
    stray = exported / "stray"
    stray.write_text("old")
    # Also in half precision: the VAE stays as it is.
    write_export(model, exported, dtype="bfloat16", report=REPORT)
    assert not stray.exists()
    assert [p.name for p in exported.parent.iterdir()] == [exported.name]
    florence = load_model(exported / "florence2")[1]
    assert {x.dtype.name for x in jax.tree.leaves(florence)} == {"bfloat16"}
    vae = load_model(exported / "stable-diffusion" / "vae")[1]
    assert {x.dtype.name for x in jax.tree.leaves(vae)} == {"float32"}
    write_export(model, exported, report=REPORT)


def test_a_config_decides_how_an_export_is_used(model, exported):
    own = load_autoencoder(None, None, str(exported))
    assert own.limits == model.experiment.data.limits
    limits = dataclasses.replace(own.limits, min_side=40)
    execution = dataclasses.replace(model.experiment.model.execution, conv="im2col")
    given = dataclasses.replace(
        model.experiment,
        model=dataclasses.replace(model.experiment.model, execution=execution),
        data=dataclasses.replace(model.experiment.data, limits=limits),
        sampling=dataclasses.replace(model.experiment.sampling, num_steps=3),
    )
    used = load_autoencoder(given, None, str(exported))
    assert (used.sampling.num_steps, used.limits.min_side) == (3, 40)
    assert used.networks.unet.execution.conv == "im2col"
    assert own.networks.unet.execution.conv != "im2col"


def test_a_random_crop_is_for_training_only(model, exported, tmp_path):
    data = dataclasses.replace(model.experiment.data, crop="random")
    from vlv_jax.exporting import export_config

    random = dataclasses.replace(
        model, experiment=dataclasses.replace(model.experiment, data=data)
    )
    assert export_config(random)["views"]["crop"] == "center"


@pytest.mark.slow
def test_the_folders_load_in_transformers_and_diffusers(exported):
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(exported / "stable-diffusion")
    assert pipeline.unet.config.cross_attention_dim == 16
    assert transformers.AutoModelForCausalLM.from_pretrained(exported / "language_model")
    assert transformers.AutoTokenizer.from_pretrained(exported / "florence2")


@pytest.mark.slow
def test_a_trained_run_and_its_export_do_the_same(tiny_hub, tmp_path):
    from vlv_jax.exporting import exportable_run
    from vlv_jax.training import train

    pictures = sorted(str(p) for p in pathlib.Path(tiny_hub.images).iterdir()
                      if p.suffix in (".png", ".jpg"))[:3]  # fmt: skip
    first = to_dataclass(Experiment, tiny_hub.experiment(steps=2))
    with pytest.raises(WorkdirError):
        exportable_run(first, tmp_path / "one")
    train(first, tmp_path / "one")
    content = tiny_hub.experiment(stage=2, steps=2, init_from=str(tmp_path / "one"), ema_decay=0.5)
    content["data"]["source"]["manifest"] = f"{tiny_hub.images}/captions.jsonl"
    second = to_dataclass(Experiment, content)
    train(second, tmp_path / "two")
    for stage, experiment in ((1, first), (2, second)):
        run, out = tmp_path / ("one", "two")[stage - 1], tmp_path / f"export{stage}"
        write_export(exportable_run(experiment, run), out)
        assert json.loads((out / "vlv_config.json").read_text())["has_language_model"] == (
            stage == 2
        )
        here, there = (Autoencoder.from_pretrained(p) for p in (run, out))
        z = here.encode(pictures)
        np.testing.assert_array_equal(z, there.encode(pictures))
        np.testing.assert_array_equal(here.reconstruct(z), there.reconstruct(z))
    captions = [Captioner.from_pretrained(p).caption(pictures) for p in (run, out)]
    assert captions[0] == captions[1]
    # The averaged weights, not the last ones.
    averaged = flatten(assemble(second, workdir=run, prefer_ema=True)[1][names.PROJECTOR])
    last = flatten(assemble(second, workdir=run, prefer_ema=False)[1][names.PROJECTOR])
    stored = flatten(Captioner.from_pretrained(out).params[names.PROJECTOR])
    for name, leaf in stored.items():
        np.testing.assert_array_equal(leaf, averaged[name])
    assert any(not np.array_equal(averaged[n], last[n]) for n in last)
    with pytest.raises(WorkdirError, match="stage-1"):
        Captioner.from_pretrained(tmp_path / "export1")
