"""The authors' released layout, from a tiny random file with its names."""

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import save_file

from core_jax.config import to_dataclass
from core_jax.convert.rules import WeightsError
from core_jax.convert.safetensors_io import CheckpointFormatError, TensorReader
from core_jax.partition import flatten
from vlv_jax import networks as names
from vlv_jax.experiment import Experiment
from vlv_jax.exporting import write_export
from vlv_jax.inference import Captioner
from vlv_jax.loading import load_networks
from vlv_jax.released import exportable_release, group_tensors
from vlv_jax.workdir import WorkdirError


@pytest.fixture(scope="module")
def experiment(tiny_hub) -> Experiment:
    return to_dataclass(Experiment, tiny_hub.experiment(stage=2))


@pytest.fixture(scope="module")
def tensors(tiny_hub, experiment) -> dict[str, np.ndarray]:
    """The hub's networks under the released names, everything else random; 9 queries."""
    rng = np.random.default_rng(3)

    def noise(*shape):
        return rng.normal(size=shape).astype(np.float32)

    parts = {
        "qwen2_model.": tiny_hub.language_model,
        "VLV_model.model.": tiny_hub.florence2,
        "VLV_model.text_encoder.": f"{tiny_hub.diffusion}/text_encoder",
    }
    found = {}
    for prefix, path in parts.items():
        reader = TensorReader(path)
        for name in reader.shapes:
            found[prefix + name] = reader.read(name) + 0.01 * noise(*reader.shapes[name])
    found["qwen2_model.lm_head.weight"] = found["qwen2_model.model.embed_tokens.weight"]
    networks, _, _ = load_networks(experiment.model, with_decoder=False)
    width = networks.florence2.config.text_config.d_model
    embed, lm = networks.text_encoder.config.hidden_size, networks.projector.features
    found |= {
        "VLV_model.query_embed": noise(1, 9, width),
        "VLV_model.language_proj.0.weight": noise(embed, width),
        "VLV_model.language_proj.0.bias": noise(embed),
        "VLV_model.language_proj.2.weight": noise(embed, embed),
        "VLV_model.language_proj.2.bias": noise(embed),
        "mlp.layers.0.weight": noise(lm, embed), "mlp.layers.0.bias": noise(lm),
        "mlp.layers.2.weight": noise(lm, lm), "mlp.layers.2.bias": noise(lm),
    }  # fmt: skip
    return found


@pytest.mark.parametrize("prefix", ["", "module."])
def test_it_becomes_a_captioner(tiny_hub, experiment, tensors, tmp_path, prefix):
    file = tmp_path / "captioner.safetensors"
    save_file({prefix + n: x for n, x in tensors.items()}, file)
    model = exportable_release(experiment, file)
    bridge, projector = model.params[names.BRIDGE], model.params[names.PROJECTOR]
    assert model.networks.bridge.num_queries == 9
    np.testing.assert_array_equal(bridge["query_embed"], tensors["VLV_model.query_embed"][0])
    np.testing.assert_array_equal(
        bridge["language_proj_0"]["kernel"], tensors["VLV_model.language_proj.0.weight"].T
    )
    np.testing.assert_array_equal(
        projector["layers_2"]["kernel"], tensors["mlp.layers.2.weight"].T
    )
    hub = load_networks(experiment.model)[1]
    for part, same in ((names.UNET, True), (names.VAE, True), (names.FLORENCE2, False),
                       (names.TEXT_ENCODER, False), (names.LANGUAGE_MODEL, False)):  # fmt: skip
        ours, theirs = flatten(model.params[part]), flatten(hub[part])
        equal = [np.array_equal(ours[n], theirs[n]) for n in theirs]
        assert all(equal) if same else not any(equal), part
    if prefix:
        return
    write_export(model, tmp_path / "out")
    loaded = Captioner.from_pretrained(tmp_path / "out")
    ours, theirs = flatten(loaded.params), flatten(model.params)
    for name, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[name], err_msg=name)


def test_every_problem_is_named(tensors):
    broken = dict(tensors) | {"stray.weight": None, "other.query_embed": None}
    del broken["mlp.layers.0.weight"]
    with pytest.raises(WeightsError) as error:
        group_tensors(broken)
    for word in ("stray.weight", "other.query_embed", "psi", "mlp.layers.0.weight"):
        assert word in str(error.value)


def test_missing_and_misshaped_tensors(experiment, tensors, tmp_path):
    few = {n: x for n, x in tensors.items() if n != "VLV_model.language_proj.2.bias"}
    save_file(few, tmp_path / "few.safetensors")
    with pytest.raises(WeightsError, match=r"language_proj\.2\.bias"):
        exportable_release(experiment, tmp_path / "few.safetensors")
    wrong = tensors | {"mlp.layers.2.bias": np.zeros(3, np.float32)}
    save_file(wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(WorkdirError, match="projector/layers_2/bias"):
        exportable_release(experiment, tmp_path / "wrong.safetensors")
    stage1 = dataclasses.replace(experiment.model, language_model="")
    with pytest.raises(WorkdirError, match="stage-2 config"):
        exportable_release(dataclasses.replace(experiment, stage=1, model=stage1), tmp_path)


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin"])
def test_a_pickle_is_refused_with_the_remedy(experiment, tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x02.")
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(CheckpointFormatError, match=r"docs/converting-pickles\.md"):
            exportable_release(experiment, path)
