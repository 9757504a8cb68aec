"""What target and drafter have in common lies on a device once."""

import jax
import pytest

from core_jax.decode.target import load_target
from massv_jax.experiment import Experiment
from massv_jax.generating import make_decoder
from massv_jax.loading import TARGET_MERGER, load_drafter, make_drafter, save_drafter
from massv_jax.phase2 import TARGET, TOWER
from massv_jax.speculative.decoder import SpeculativeDecoder
from massv_jax.training import build_job


def _places(tree):
    """Where the buffers of every leaf begin."""
    return [s.data.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)
            for s in x.addressable_shards]  # fmt: skip


@pytest.fixture(scope="module")
def mlp(qwen_pair, tmp_path_factory):
    """A directory of a drafter that reads what the target's merger says."""
    path = tmp_path_factory.mktemp("mlp")
    save_drafter(path, make_drafter(qwen_pair.target, qwen_pair.language_model, kind="mlp"))
    return path


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_drafter_takes_the_merger_of_a_loaded_target(qwen_pair, mlp, dtype):
    decoder = make_decoder(str(qwen_pair.target), str(mlp), dtype=dtype)
    merger = decoder.target.params["visual"]["merger"]
    assert _places(decoder.drafter.params[TARGET_MERGER]) == _places(merger)
    places = _places({"target": decoder.target.params, "drafter": decoder.drafter.params})
    assert len(places) - len(set(places)) == len(jax.tree.leaves(merger))


def test_also_where_the_drafter_was_loaded_by_itself(qwen_pair, mlp):
    target = load_target(qwen_pair.target)
    parts = load_drafter(mlp, qwen_pair.target)
    merger = target.params["visual"]["merger"]
    assert _places(parts.params[TARGET_MERGER]) != _places(merger)  # the test can tell
    decoder = SpeculativeDecoder(target, parts)
    assert _places(decoder.drafter.params[TARGET_MERGER]) == _places(merger)


def test_a_loaded_target_is_not_read_again(qwen_pair, mlp, monkeypatch):
    from massv_jax import loading

    target = load_target(qwen_pair.target)
    monkeypatch.setattr(loading, "load_merger", None)
    monkeypatch.setattr(loading, "prefix_target", None)
    load_drafter(mlp, qwen_pair.target, loaded=target)
    make_drafter(qwen_pair.target, qwen_pair.language_model, kind="mlp", loaded=target)


@pytest.mark.parametrize("kind", ["merger", "mlp"])
def test_tower_and_merger_are_frozen_once_beside_a_teacher(qwen_pair, kind):
    from core_jax.config import to_dataclass

    experiment = to_dataclass(Experiment, {
        "task": "phase2",
        "model": {"target": str(qwen_pair.target), "language_model": str(qwen_pair.language_model),
                  "kind": kind, "frozen_dtype": "bfloat16"},
        "loss": {"kl": 1.0, "teacher": "target"},
        "optimizer": {"learning_rate": 1e-3, "total_steps": 10},
    })  # fmt: skip
    frozen = build_job(experiment).frozen
    assert "merger" not in frozen[TOWER]
    assert {x.dtype.name for x in jax.tree.leaves(frozen)} == {"bfloat16"}
    assert {"merger", "language_model"} == frozen[TARGET].keys()
    if kind == "mlp":
        assert _places(frozen[TARGET]["merger"]) == _places(frozen[TARGET_MERGER])
    else:
        assert TARGET_MERGER not in frozen
