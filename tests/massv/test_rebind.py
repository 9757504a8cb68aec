"""A drafter for the same target in other tensors."""

import json

import pytest

from core_jax.models import load_model, save_model
from massv_jax.binding import BindingError, weight_hashes
from massv_jax.loading import CONFIG_FILE
from massv_jax.rebind import rebind
from tests.massv.tiny_pairs import write_qwen


def test_a_copy_is_bound_to_the_other_tensors(tmp_path):
    target, other, drafter = (tmp_path / name for name in ("target", "other", "drafter"))
    model, params = load_model(write_qwen(tmp_path).target, dtype="float32")
    save_model(target, model, params)
    save_model(other, *load_model(target, dtype="bfloat16"))
    weights, tower = weight_hashes(target)
    drafter.mkdir()
    bound = {"name": "target", "weights": weights, "tower": tower, "template": "kept"}
    (drafter / CONFIG_FILE).write_text(json.dumps({"kind": "merger", "target": bound}))
    rebind(drafter, tmp_path / "copy", target, other)
    made = json.loads((tmp_path / "copy" / CONFIG_FILE).read_text())
    weights, tower = weight_hashes(other)
    assert weights != bound["weights"]
    assert made["target"] == bound | {"name": "other", "weights": weights, "tower": tower}
    assert made["kind"] == "merger"
    with pytest.raises(BindingError, match="was not made for"):
        rebind(drafter, tmp_path / "wrong", other, target)
    with pytest.raises(BindingError, match="is no drafter's directory"):
        rebind(target, tmp_path / "wrong", target, other)
    assert not (tmp_path / "wrong").exists()
