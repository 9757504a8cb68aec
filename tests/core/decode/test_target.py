"""Targets are found by model type, wherever they are installed."""

import json
import sys

import numpy as np
import pytest

from core_jax.decode.frontends import allowed_length, pad_left
from core_jax.decode.target import TargetError, load_target, registered_targets


def _directory(path, **config):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_ours_are_registered_and_can_be_imported():
    found = registered_targets()
    assert {"qwen2", "qwen2_5_vl", "gemma3", "gemma3_text", "vlv"} <= set(found)
    for name in ("qwen2", "qwen2_5_vl", "gemma3", "gemma3_text"):
        assert callable(found[name].load())


def test_another_package_registers_its_own(tmp_path, monkeypatch):
    site = tmp_path / "site"
    info = site / "their_models-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-models\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[core_jax.targets]\ntheirs = their_models:load\n")
    (site / "their_models.py").write_text(
        "def load(path, **options):\n    return path.name, options\n"
    )
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, "their_models", raising=False)
    path = _directory(tmp_path / "a-model", model_type="theirs")
    assert load_target(path, dtype="bfloat16") == ("a-model", {"dtype": "bfloat16"})
    composite = tmp_path / "composite"
    composite.mkdir()
    (composite / "theirs_config.json").write_text("{}")
    assert load_target(composite) == ("composite", {})


def test_an_unknown_type_says_what_is_known_and_how_to_register(tmp_path):
    path = _directory(tmp_path / "m", model_type="mamba9")
    with pytest.raises(TargetError, match="mamba9") as caught:
        load_target(path)
    message = str(caught.value)
    assert all(name in message for name in ("qwen2_5_vl", "gemma3_text", "core_jax.targets"))
    assert 'mamba9 = package.module:load"' in message


def test_directories_that_hold_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="is missing; is"):
        load_target(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="merge it into the model"):
        load_target(tmp_path)
    with pytest.raises(TargetError, match="names no model_type"):
        load_target(_directory(tmp_path / "m", architectures=["X"]))


def test_prompts_get_the_smallest_length_that_holds_them():
    assert allowed_length(9, [32, 8, 16]) == 16
    assert allowed_length(9, None) == 9
    with pytest.raises(ValueError, match=r"33 tokens is longer .* \(32\)"):
        allowed_length(33, [8, 32])


def test_padding_is_on_the_left():
    ids = np.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(pad_left(ids, 5, 9), [[9, 9, 0, 1, 2], [9, 9, 3, 4, 5]])
