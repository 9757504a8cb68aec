import dataclasses
import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_jax.partition import tree_hash
from core_jax.sharding import DEFAULT_RULES, abstract_like, make_mesh, param_shardings
from core_jax.train.checkpoint import Checkpoints, _directory_of, load_params, warm_start
from core_jax.train.errors import NonFiniteError, ResumeError
from core_jax.train.run_record import (
    RunRecord,
    decide_start,
    has_checkpoint,
    versions,
    write_record,
)
from core_jax.train.state import create_state, init_state
from tests.core.train import tiny_problem as tiny


@pytest.fixture
def state():
    return tiny.setup(ema_decay=0.9)[1]


def at(state, step):
    """The state with another step number and recognisable parameters."""
    params = jax.tree.map(lambda x: x + step, state.params)
    return state.replace(step=jnp.int32(step), params=params)


def abstract(state):
    return abstract_like(state, jax.sharding.SingleDeviceSharding(jax.devices()[0]))


def save_all(workdir, state, steps, **kwargs):
    with Checkpoints(workdir, **kwargs) as checkpoints:
        for step in steps:
            checkpoints.save(step, at(state, step))


def test_round_trip_is_bitwise(tmp_path, state):
    save_all(tmp_path, state, [3])
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(abstract(state))
    tiny.assert_equal(restored, at(state, 3))


def test_without_checkpoints_restore_returns_none(tmp_path, state):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(abstract(state)) is None


def test_interval_and_number_kept(tmp_path, state):
    with Checkpoints(tmp_path, every=2, keep=2, keep_every=4) as checkpoints:
        asked = [step for step in range(1, 13) if checkpoints.should_save(step)]
        for step in asked:
            checkpoints.save(step, at(state, step))
        checkpoints.wait()
        assert asked == [2, 4, 6, 8, 10, 12]
        assert checkpoints.steps() == [4, 8, 10, 12]


def test_saving_a_step_twice_is_harmless(tmp_path, state):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.save(1, at(state, 1))
        checkpoints.wait()
        assert not checkpoints.save(1, at(state, 1))


def test_donation_after_save_does_not_reach_the_file(tmp_path):
    """The save runs in the background while the next step reuses the buffers."""
    step, state, _ = tiny.setup()
    jitted = jax.jit(step, donate_argnums=0)
    with Checkpoints(tmp_path, keep=10) as checkpoints:
        want = {}
        for i in range(4):
            state, _ = jitted(state, tiny.frozen(), tiny.batch(i))
            # A copy in numpy's own memory; a view would protect the buffer from donation.
            want[i + 1] = jax.tree.map(lambda x: np.array(x, copy=True), state.params)
            checkpoints.save(i + 1, state)
    for number, params in want.items():
        with Checkpoints(tmp_path, keep=10) as checkpoints:
            restored = checkpoints._try(number, abstract(state))
        tiny.assert_equal(restored.params, params)


@pytest.mark.parametrize("field", ["params", "ema", "opt_state"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_state_is_never_written(tmp_path, state, field, value):
    bad = jax.tree.map(lambda x: x, getattr(state, field))
    leaves, treedef = jax.tree.flatten(bad)
    index = next(i for i, x in enumerate(leaves) if x.ndim == 2)
    leaves[index] = leaves[index].at[1, 1].set(value)
    bad = state.replace(**{field: jax.tree.unflatten(treedef, leaves)})
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(NonFiniteError, match=f"step 0 is not finite.*{field}") as info:
            checkpoints.save(0, bad)
        assert info.value.step == 0
        assert checkpoints.steps() == []
    assert not has_checkpoint(tmp_path)


def test_wrong_step_is_refused(tmp_path, state):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match="at step 0, not at"):
        checkpoints.save(5, state)


def test_frozen_weights_are_not_in_the_checkpoint(tmp_path, state):
    save_all(tmp_path, state, [1])
    text = (tmp_path / "checkpoints/1/state/_METADATA").read_text()
    assert "kernel" in text
    assert "tower" not in text
    arrays = sum(x.size for x in jax.tree.leaves(state))
    metadata = json.loads((tmp_path / "checkpoints/1/state/array_metadatas/process_0").read_text())
    stored = sum(
        int(np.prod(m["array_metadata"]["write_shape"])) for m in metadata["array_metadatas"]
    )
    assert stored == arrays


@pytest.mark.parametrize("devices", [8, 2, 1])
def test_restore_on_another_topology(tmp_path, devices):
    """Saved on 8 devices; read on 8 (another mesh), 2 and 1."""
    _, _, optimizer = tiny.setup()

    def build(mesh):
        shardings = param_shardings(tiny.params(), tiny.PARAM_AXES, DEFAULT_RULES, mesh)
        return create_state(
            tiny.params(), optimizer, param_shardings=shardings, mesh=mesh, ema=True
        )

    state, _ = build(make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    save_all(tmp_path, state, [4])
    mesh = make_mesh({"fsdp": devices}, jax.devices()[:devices])
    other, shardings = build(mesh)
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(abstract_like(other, shardings))
    tiny.assert_equal(restored, at(state, 4))
    kernel = restored.params["up"]["kernel"]
    assert kernel.sharding == shardings.params["up"]["kernel"]
    assert len(kernel.sharding.device_set) == devices


def test_restore_wants_shardings(tmp_path, state):
    bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(ValueError, match="sharding for every"),
    ):
        checkpoints.restore(bare)


def largest_file(directory):
    files = [p for p in pathlib.Path(directory).rglob("*") if p.is_file() and p.parent.name == "d"]
    return max((p for p in files if "process" not in str(p)), key=lambda p: p.stat().st_size)


DAMAGE = {
    "truncated": lambda d: os.truncate(largest_file(d), largest_file(d).stat().st_size // 2),
    "missing": lambda d: largest_file(d).unlink(),
    "no manifest": lambda d: (d / "state/manifest.ocdbt").unlink(),
    "no marker": lambda d: [file.unlink() for file in d.glob("*") if file.is_file()],
    "no half of the marker": lambda d: (d / "_CHECKPOINT_METADATA").unlink(),
    "torn marker": lambda d: (d / "_CHECKPOINT_METADATA").write_text("{"),
    "empty folder": lambda d: shutil.rmtree(d) or d.mkdir(),
    "broken json": lambda d: (d / "state/_METADATA").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_skipped(tmp_path, state, damage, caplog):
    save_all(tmp_path, state, [1, 2], keep=3)
    DAMAGE[damage](tmp_path / "checkpoints/2")
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        restored = checkpoints.restore(abstract(state))
        tiny.assert_equal(restored, at(state, 1))
        assert "checkpoints/2 is damaged" in caplog.text
        # Training comes by step 2 again.
        assert checkpoints.steps() == [1]
        assert checkpoints.save(2, at(state, 2))
    assert (tmp_path / "broken_checkpoints/2-0").exists()
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        tiny.assert_equal(checkpoints.restore(abstract(state)), at(state, 2))


def test_unfinished_save_is_ignored_and_removed(tmp_path, state):
    save_all(tmp_path, state, [1])
    left = tmp_path / "checkpoints/2.orbax-checkpoint-tmp"
    left.mkdir()
    (left / "state").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]
        tiny.assert_equal(checkpoints.restore(abstract(state)), at(state, 1))
    assert not left.exists()


def test_only_damaged_checkpoints_is_an_error_not_a_fresh_start(tmp_path, state):
    save_all(tmp_path, state, [1])
    DAMAGE["truncated"](tmp_path / "checkpoints/1")
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ResumeError, match=r"none of .*\[1\]"):
        checkpoints.restore(abstract(state))
    assert (tmp_path / "checkpoints/1").exists()


def test_another_model_is_an_error_not_a_damaged_file(tmp_path, state):
    save_all(tmp_path, state, [1])
    other = tiny.params()
    other["up"]["bias"] = jnp.zeros((5,))
    other["new"] = jnp.zeros((2,))
    other = init_state(other, tiny.setup()[2], ema=True)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ResumeError) as info:
        checkpoints.restore(abstract(other))
    assert "params/new: absent in the checkpoint, float32[2] here" in str(info.value)
    assert "params/up/bias: float32[16] in the checkpoint, float32[5] here" in str(info.value)


def test_load_params_reads_parameters_only(tmp_path, state):
    save_all(tmp_path, state, [1, 2])
    tiny.assert_equal(load_params(tmp_path), at(state, 2).params)
    tiny.assert_equal(load_params(tmp_path, ema=True), at(state, 2).ema)
    mesh = make_mesh({"fsdp": 8})
    sharded = load_params(
        tmp_path, shardings=lambda a: param_shardings(a, tiny.PARAM_AXES, DEFAULT_RULES, mesh)
    )
    tiny.assert_equal(sharded, at(state, 2).params)
    assert len(sharded["up"]["kernel"].sharding.device_set) == 8


def test_relative_paths_are_read_and_addresses_stay(tmp_path, state, monkeypatch):
    save_all(tmp_path / "run", state, [2])
    monkeypatch.chdir(tmp_path)
    tiny.assert_equal(load_params("run"), at(state, 2).params)
    assert str(_directory_of("gs://bucket/run")) == "gs://bucket/run/checkpoints"


def test_load_params_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no readable checkpoint"):
        load_params(tmp_path)
    save_all(tmp_path, tiny.setup()[1], [1])
    with pytest.raises(ValueError, match="no ema"):
        load_params(tmp_path, ema=True)


def test_load_params_skips_a_damaged_checkpoint(tmp_path, state):
    save_all(tmp_path, state, [1, 2])
    DAMAGE["truncated"](tmp_path / "checkpoints/2")
    tiny.assert_equal(load_params(tmp_path), at(state, 1).params)


def test_warm_start():
    source = {"up": jax.tree.map(lambda x: np.asarray(x) + 1, tiny.params()["up"])}
    out = warm_start(tiny.params(), source, keep=("down",))
    tiny.assert_equal(out["up"], source["up"])
    tiny.assert_equal(out["down"], tiny.params()["down"])
    with pytest.raises(ValueError, match="down/kernel: not in the source"):
        warm_start(tiny.params(), source)
    with pytest.raises(ValueError, match="side: not a parameter here"):
        warm_start(tiny.params(), tiny.params() | {"side": np.zeros(2)})
    wrong = tiny.params()
    wrong["up"]["bias"] = np.zeros(3)
    with pytest.raises(ValueError, match=r"up/bias: shape \(3,\) in the source, \(16,\) here"):
        warm_start(tiny.params(), wrong)


RECORD = RunRecord(
    fingerprint={"model": {"width": 8}, "batch": 16, "patterns": ("a", "b")},
    data_seed=1,
    frozen_hashes={"tower": "abc"},
    config={"log_every": 10},
)


def changed(**kwargs):
    return RunRecord(**{**vars(RECORD), **kwargs})


def test_start_is_fresh_warm_or_resumed(tmp_path, state):
    assert decide_start(tmp_path, RECORD) == "fresh"
    assert decide_start(tmp_path, changed(init_from="/other")) == "warm"
    write_record(tmp_path, RECORD, resumed_at=None)
    # Without a checkpoint nothing is lost by starting with other settings.
    assert decide_start(tmp_path, changed(data_seed=2)) == "fresh"
    save_all(tmp_path, state, [1])
    assert decide_start(tmp_path, RECORD) == "resume"
    assert decide_start(tmp_path, changed(config={"log_every": 99})) == "resume"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": {**RECORD.fingerprint, "model": {"width": 9}}}, "width: was 8, now 9"),
        ({"fingerprint": {"model": {"width": 8}, "batch": 16}}, "patterns: was .*now \"absent\""),
        ({"data_seed": 2}, "data_seed: was 1, now 2"),
        ({"frozen_hashes": {"tower": "xyz"}}, "tower: was \"abc\", now \"xyz\""),
        ({"init_from": "/other"}, "init_from=None, and init_from='/other' is asked for"),
    ],
)  # fmt: skip
def test_resume_is_refused_when_what_matters_changed(tmp_path, state, change, message):
    write_record(tmp_path, RECORD, resumed_at=None)
    save_all(tmp_path, state, [1])
    with pytest.raises(ResumeError, match=message):
        decide_start(tmp_path, changed(**change))


def test_resume_of_a_warm_started_run(tmp_path, state):
    record = changed(init_from="/other")
    write_record(tmp_path, record, resumed_at=None)
    save_all(tmp_path, state, [1])
    assert decide_start(tmp_path, record) == "resume"
    for other in (None, "/another"):
        with pytest.raises(ResumeError, match="init_from='/other'"):
            decide_start(tmp_path, changed(init_from=other))


def test_a_warm_start_needs_the_weights_that_the_source_was_trained_with(tmp_path):
    source = changed(config={"model": {"tower": "hub/a"}})
    write_record(tmp_path / "one", source, resumed_at=None)
    new = changed(init_from=str(tmp_path / "one"), config={"model": {"tower": "hub/b"}})
    # The same bytes elsewhere, and networks that the source did not have, are no difference.
    more = {"tower": "abc", "language_model": "ghi", "init_from": "jkl"}
    assert decide_start(tmp_path / "two", dataclasses.replace(new, frozen_hashes=more)) == "warm"
    with pytest.raises(ResumeError, match=r"tower: there hub/a \(hash abc\), here hub/b \(xyz\)"):
        decide_start(tmp_path / "two", dataclasses.replace(new, frozen_hashes={"tower": "xyz"}))


def test_checkpoints_without_a_record_are_refused(tmp_path, state):
    save_all(tmp_path, state, [1])
    with pytest.raises(ResumeError, match=r"no run\.json"):
        decide_start(tmp_path, RECORD)


def test_record_keeps_the_history(tmp_path):
    record = changed(frozen_hashes={"tower": tree_hash(tiny.frozen())})
    write_record(tmp_path, record, resumed_at=None)
    write_record(tmp_path, record, resumed_at=7)
    content = json.loads((tmp_path / "run.json").read_text())
    assert [start["step"] for start in content["starts"]] == [0, 7]
    assert content["starts"][0]["versions"] == versions()
    assert content["frozen_hashes"]["tower"] == tree_hash(tiny.frozen())
    assert {"jax", "flax", "optax", "orbax-checkpoint"} <= set(versions())
