"""A grown target says what the small one says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_jax.models import load_model
from core_jax.partition import count_parameters, flatten
from miniature.grow import grow
from tests.massv.tiny_pairs import write_qwen


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    pair = write_qwen(tmp_path_factory.mktemp("pair"))
    return load_model(pair.target, dtype="float32")


def _logits(model, params):
    ids = jnp.asarray(np.random.default_rng(0).integers(7, 290, (2, 12)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(12)[None, None], (3, 2, 12))
    slots = jnp.full((2, 12), -1, jnp.int32)
    return jax.jit(lambda p: model.apply({"params": p}, ids, positions, slots))(params)


def test_logits_stay(small):
    model, params = small
    grown, larger = grow(model, params, layers=4, intermediate_size=96)
    assert count_parameters(larger) > 1.5 * count_parameters(params)
    before, after = _logits(model, params), _logits(grown, larger)
    scale = jnp.abs(before).max()
    assert jnp.abs(after - before).max() < 1e-5 * scale
    # The control: what was added does something once it may.
    layers = larger["language_model"]["layers"]
    kernel = layers["mlp"]["down_proj"]["kernel"]
    woken = {
        **larger,
        "language_model": {
            **larger["language_model"],
            "layers": {**layers, "mlp": {**layers["mlp"], "down_proj": {"kernel": kernel + 0.1}}},
        },
    }
    assert jnp.abs(_logits(grown, woken) - before).max() > 1e-3 * scale


def test_new_weights_are_not_zero(small):
    model, params = small
    _, larger = grow(model, params, layers=4, intermediate_size=96)
    for path, leaf in flatten(larger["language_model"]["layers"]).items():
        new = np.asarray(leaf)[2:]
        zero = "o_proj" in path or "down_proj" in path
        assert (np.abs(new).max() == 0) == zero, path


def test_a_target_does_not_shrink(small):
    model, params = small
    with pytest.raises(ValueError, match="fewer or narrower"):
        grow(model, params, layers=1, intermediate_size=96)
