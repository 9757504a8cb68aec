import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_jax.sharding import (
    DEFAULT_RULES,
    batch_sharding,
    make_mesh,
    param_shardings,
    replicated,
)
from core_jax.train.errors import NonFiniteError, ResumeError
from core_jax.train.loop import Hook, LoopConfig, run_training
from core_jax.train.metrics import JsonlWriter, MultiWriter
from core_jax.train.run_record import RunRecord, has_checkpoint
from core_jax.train.state import create_state
from core_jax.train.step import jit_train_step
from core_jax.watchdog import HUNG
from tests.core.train import tiny_problem as tiny


class ListWriter:
    def __init__(self):
        self.rows, self.started, self.closed = [], None, False

    def start(self, step, total_steps):
        self.started = (step, total_steps)

    def write(self, step, metrics):
        self.rows.append((step, dict(metrics)))

    def write_images(self, step, images):
        raise AssertionError("no images here")

    def close(self):
        self.closed = True


def train(
    workdir, total, *, save_every=100, log_every=1, count_flops=None, loss=tiny.noisy_loss_fn,
    **kwargs,
):  # fmt: skip
    step, state, _ = tiny.setup(loss, ema_decay=0.9)
    config = LoopConfig(
        total_steps=total, log_every=log_every, save_every=save_every, count_flops=count_flops
    )
    arguments = {
        "state": state,
        "step_fn": step,
        "frozen": tiny.frozen(),
        "make_batches": tiny.batches,
        "workdir": workdir,
        "writers": MultiWriter([]),
    }
    return run_training(config, **(arguments | kwargs))


def test_loop_equals_a_plain_loop(tmp_path):
    step, state, _ = tiny.setup(ema_decay=0.9)
    step = jax.jit(step)
    for i in range(4):
        state, _ = step(state, tiny.frozen(), tiny.batch(i))
    result = train(tmp_path, 4)
    assert (result.step, result.preempted) == (4, False)
    tiny.assert_equal(result.state, state)


def test_lines_are_on_the_disk_before_a_checkpoint_that_goes_on_after_them(tmp_path, monkeypatch):
    from core_jax.train.checkpoint import Checkpoints

    done = []
    save, fsync = Checkpoints.save, os.fsync
    monkeypatch.setattr(
        Checkpoints, "save", lambda self, step, state: (done.append(step), save(self, step, state))
    )
    metrics = tmp_path / "metrics.jsonl"

    def noted(number):
        if metrics.exists() and os.path.samestat(os.fstat(number), metrics.stat()):
            done.append(f"{len(metrics.read_text().splitlines())} lines")
        fsync(number)

    monkeypatch.setattr(os, "fsync", noted)
    train(tmp_path, 4, save_every=2, writers=MultiWriter([JsonlWriter(str(metrics))]))
    assert done == ["2 lines", 2, "4 lines", 4]


def test_resumed_equals_uninterrupted(tmp_path):
    want = train(tmp_path / "whole", 7).state
    train(tmp_path / "parts", 3)
    starts = []

    def make_batches(start):
        starts.append(start)
        return tiny.batches(start)

    got = train(tmp_path / "parts", 7, make_batches=make_batches)
    tiny.assert_equal(got.state, want)
    assert starts == [3]
    record = json.loads((tmp_path / "parts/run.json").read_text())
    assert [entry["step"] for entry in record["starts"]] == [0, 3]
    # The control: another data position gives other parameters.
    train(tmp_path / "shifted", 3)
    shifted = train(tmp_path / "shifted", 7, make_batches=lambda start: tiny.batches(start + 1))
    assert tiny.max_difference(shifted.state.params, want.params) > 1e-4


def test_resume_needs_only_an_abstract_state(tmp_path):
    train(tmp_path, 2)
    state = tiny.setup(ema_decay=0.9)[1]
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    got = train(tmp_path, 4, state=abstract)
    tiny.assert_equal(got.state, train(tmp_path / "whole", 4).state)
    with pytest.raises(ValueError, match="has no checkpoint"):
        train(tmp_path / "new", 4, state=abstract)


def test_sharded_loop_and_resume_on_another_mesh(tmp_path):
    want = train(tmp_path / "one", 6).state

    def on(mesh, total):
        step, _, optimizer = tiny.setup(ema_decay=0.9)
        shardings = param_shardings(tiny.params(), tiny.PARAM_AXES, DEFAULT_RULES, mesh)
        state, all_shardings = create_state(
            tiny.params(), optimizer, param_shardings=shardings, mesh=mesh, ema=True
        )
        frozen = jax.device_put(tiny.frozen(), replicated(tiny.frozen(), mesh))
        rows = batch_sharding(mesh)
        jitted = jit_train_step(step, all_shardings, replicated(frozen, mesh), rows, mesh)
        return train(
            tmp_path / "many",
            total,
            state=state,
            step_fn=jitted,
            frozen=frozen,
            batch_sharding=rows,
        )

    on(make_mesh({"data": 2, "fsdp": 2, "tensor": 2}), 3)
    got = on(make_mesh({"fsdp": 2}, jax.devices()[:2]), 6)
    assert got.step == 6
    assert tiny.max_difference(got.state.params, want.params) < 5e-6


def test_finished_run_does_nothing(tmp_path):
    train(tmp_path, 2)

    def make_batches(start):
        raise AssertionError("no batch is needed")

    assert train(tmp_path, 2, make_batches=make_batches).step == 2


def test_logged_metrics(tmp_path):
    writer = ListWriter()
    train(tmp_path, 5, log_every=2, writers=writer)
    assert writer.started == (0, 5)
    assert writer.closed
    assert [step for step, _ in writer.rows] == [2, 4, 5]
    names = {"loss", "lr", "grad_norm", "images_per_second", "steps_per_second", "data_wait"}
    assert names <= set(writer.rows[0][1])
    assert "nonfinite" not in writer.rows[0][1]
    assert 0 <= writer.rows[0][1]["data_wait"] <= 1
    # Means over the interval.
    single = ListWriter()
    train(tmp_path / "single", 5, log_every=1, writers=single)
    losses = [row["loss"] for _, row in single.rows]
    assert writer.rows[0][1]["loss"] == pytest.approx(np.mean(losses[:2]))
    assert writer.rows[2][1]["loss"] == pytest.approx(losses[4])


def test_mfu(tmp_path, monkeypatch):
    monkeypatch.setattr("core_jax.train.loop.peak_flops", lambda: 1e9)
    writer = ListWriter()
    step, state, _ = tiny.setup()
    config = LoopConfig(total_steps=3, log_every=3, count_flops=lambda: 1e6)
    run_training(
        config, state=state, step_fn=step, frozen=tiny.frozen(), make_batches=tiny.batches,
        workdir=tmp_path, writers=writer,
    )  # fmt: skip
    row = writer.rows[0][1]
    assert row["mfu"] == pytest.approx(1e6 * row["steps_per_second"] / 1e9)
    # Without a count of the caller's, or with one that fails, the compiler's is used.
    for count in (None, lambda: 1 / 0):
        writer = ListWriter()
        train(tmp_path / f"{count}", 2, writers=writer, count_flops=count)
        assert writer.rows[0][1]["mfu"] > 0


def test_data_wait_sees_slow_data(tmp_path):
    def slow(start):
        for batch in tiny.batches(start):
            time.sleep(0.05)
            yield batch

    writer = ListWriter()
    train(tmp_path, 5, log_every=5, writers=writer, make_batches=slow)
    assert writer.rows[0][1]["data_wait"] > 0.5


def test_metrics_are_fetched_after_the_next_dispatch(tmp_path, monkeypatch):
    events = []
    original = jax.device_get
    monkeypatch.setattr(
        "core_jax.train.loop.jax.device_get",
        lambda x: events.append("fetch") or original(x),
    )

    def make_batches(start):
        for batch in tiny.batches(start):
            events.append("batch")
            yield batch

    train(tmp_path, 4, make_batches=make_batches)
    # Batch 0; then for each step: dispatch, next batch, and only then the older step's metrics.
    assert events[:6] == ["batch", "batch", "batch", "fetch", "batch", "fetch"]


def test_hooks(tmp_path):
    calls = []

    def note(name):
        def fn(step, state):
            calls.append((name, step, int(state.step)))
            return {f"{name}_value": float(step)}

        return fn

    writer = ListWriter()
    hooks = [Hook(2, note("a"), at_start=True), Hook(3, note("b"), at_end=False)]
    train(tmp_path, 5, hooks=hooks, writers=writer, log_every=5)
    assert calls == [("a", 0, 0), ("a", 2, 2), ("b", 3, 3), ("a", 4, 4), ("a", 5, 5)]
    assert (2, {"a_value": 2.0}) in writer.rows
    calls.clear()
    train(tmp_path, 6, hooks=hooks)
    assert calls == [("a", 6, 6), ("b", 6, 6)]


def poisoned(params, frozen, batch, key):
    loss, metrics = tiny.noisy_loss_fn(params, frozen, batch, key)
    return loss + jnp.where(batch["poison"].sum() > 0, jnp.nan, 0.0), metrics


def poisoned_batches(bad_step):
    def make(start):
        for i, batch in enumerate(tiny.batches(start), start):
            yield batch | {"poison": np.full(tiny.BATCH, float(i == bad_step), np.float32)}

    return make


@pytest.mark.parametrize("save_every", [1, 4, 5, 100])
def test_non_finite_step_stops_names_the_batch_and_saves_nothing(tmp_path, save_every):
    arguments = {"loss": poisoned, "save_every": save_every}
    with pytest.raises(NonFiniteError, match=r"step 4 .*loss=nan.*s4-0, s4-1") as info:
        train(tmp_path, 9, make_batches=poisoned_batches(4), **arguments)
    assert info.value.step == 4
    assert info.value.ids == [f"s4-{i}" for i in range(tiny.BATCH)]
    ids = json.loads((tmp_path / "nonfinite-4-process0.json").read_text())["ids"]
    assert ids == info.value.ids
    saved = max((int(p.name) for p in (tmp_path / "checkpoints").iterdir()), default=0)
    assert saved <= 4
    assert saved == {1: 4, 4: 4, 5: 0, 100: 0}[save_every]
    # With the batch repaired the run continues to what an undisturbed one gives.
    got = train(tmp_path, 9, make_batches=poisoned_batches(-1), **arguments)
    want = train(tmp_path / "good", 9, make_batches=poisoned_batches(-1), **arguments)
    tiny.assert_equal(got.state, want.state)


def test_end_of_data_is_an_error(tmp_path):
    def short(start):
        yield from (tiny.batch(i) for i in range(2))

    with pytest.raises(RuntimeError, match="ended before step 2 of 5"):
        train(tmp_path, 5, make_batches=short)


def test_record_guards_resumption(tmp_path):
    train(tmp_path, 2, record=RunRecord(fingerprint={"lr": 1}))
    with pytest.raises(ResumeError, match=r"fingerprint\.lr: was 1, now 2"):
        train(tmp_path, 4, record=RunRecord(fingerprint={"lr": 2}))
    with pytest.raises(ResumeError, match="init_from"):
        train(tmp_path, 4, record=RunRecord(fingerprint={"lr": 1}, init_from="elsewhere"))
    assert train(tmp_path, 4, record=RunRecord(fingerprint={"lr": 1})).step == 4
    # What init_from held is compared where it was recorded; earlier releases did not.
    hashed = RunRecord(fingerprint={"lr": 1}, frozen_hashes={"init_from": "a"})
    assert train(tmp_path, 5, record=hashed).step == 5
    with pytest.raises(ResumeError, match=r"frozen_hashes\.init_from: was"):
        train(tmp_path, 6, record=dataclasses.replace(hashed, frozen_hashes={"init_from": "b"}))
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ResumeError, match=r"run\.json is damaged"):
        train(tmp_path, 6, record=hashed)


def test_failing_writer_does_not_stop_training(tmp_path):
    class Broken(ListWriter):
        def write(self, step, metrics):
            raise OSError("disk full")

    good = ListWriter()
    assert train(tmp_path, 5, writers=MultiWriter([Broken(), good])).step == 5
    assert len(good.rows) == 5


def test_two_batch_shapes_compile_two_steps(tmp_path):
    def make_batches(start):
        for i, batch in enumerate(tiny.batches(start), start):
            yield {k: v[:8] for k, v in batch.items()} if i % 2 else batch

    assert train(tmp_path, 4, make_batches=make_batches).step == 4


def test_sigterm_in_process_saves_and_returns(tmp_path, capfd):
    def make_batches(start):
        for i, batch in enumerate(tiny.batches(start), start):
            if i == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    before = signal.getsignal(signal.SIGTERM)
    result = train(tmp_path, 9, make_batches=make_batches)
    assert result.preempted
    assert 3 <= result.step < 9
    assert has_checkpoint(tmp_path)
    assert f"SIGTERM: saving step {result.step}" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
    got = train(tmp_path, 9)
    tiny.assert_equal(got.state, train(tmp_path / "whole", 9).state)


def launch(workdir, steps, pause, *cluster, devices=1):
    script = pathlib.Path(__file__).with_name("run_tiny.py")
    root = script.parents[3]
    env = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    command = [sys.executable, *map(str, (script, workdir, steps, pause, *cluster))]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True)


def wait_for_line(workdir, step, process):
    """Waits until the run has logged a step."""
    path = workdir / "metrics.jsonl"
    for _ in range(6000):
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("the run did not get there")


def leaves(workdir):
    with np.load(workdir / "final.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
def test_killed_process_resumes_bitwise(tmp_path, number):
    whole = launch(tmp_path / "whole", 12, 0)
    killed = launch(tmp_path / "killed", 12, 0.3)
    wait_for_line(tmp_path / "killed", 5, killed)
    killed.send_signal(number)
    out, err = killed.communicate(timeout=600)
    if number == signal.SIGTERM:
        assert killed.returncode == 0, err
        assert "preempted" in out
        assert "SIGTERM: saving step" in err
    else:
        assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed/final.npz").exists()

    again = launch(tmp_path / "killed", 12, 0)
    out, err = again.communicate(timeout=600)
    assert again.returncode == 0, err
    assert "finished 12" in out
    assert "resumed at step" in err
    assert whole.wait(timeout=600) == 0
    tiny.assert_equal(leaves(tmp_path / "killed"), leaves(tmp_path / "whole"))
    # Every step is in the log once, in order.
    rows = [json.loads(line) for line in (tmp_path / "killed/metrics.jsonl").open()]
    assert [row["step"] for row in rows] == list(range(1, 13))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_saves_in_both(tmp_path):
    """And the run goes on in one process, to where one process would have gone."""
    port = free_port()
    pair = [launch(tmp_path / "run", 200, 0.1, i, 2, port, devices=2) for i in range(2)]
    wait_for_line(tmp_path / "run", 4, pair[0])
    pair[1].send_signal(signal.SIGTERM)
    outs = [process.communicate(timeout=600) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outs
    steps = {out.split()[-1] for out, _ in outs}
    assert len(steps) == 1
    assert all("preempted" in out for out, _ in outs)
    saved = int(steps.pop())
    assert (tmp_path / "run/checkpoints" / str(saved)).exists()

    alone = launch(tmp_path / "run", saved + 3, 0, devices=4)
    whole = launch(tmp_path / "whole", saved + 3, 0, devices=1)
    assert alone.wait(timeout=600) == 0, alone.communicate()
    assert whole.wait(timeout=600) == 0, whole.communicate()
    a, b = leaves(tmp_path / "run"), leaves(tmp_path / "whole")
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=2e-5, err_msg=name)


@pytest.mark.slow
def test_a_loader_that_hangs_in_one_of_two_processes_is_named_by_both(tmp_path):
    """The other one waits for it in a collective; afterwards the run goes on where it was."""
    port = free_port()
    pair = [launch(tmp_path / "run", 9, 0, i, 2, port, 15, devices=2) for i in range(2)]
    said = [process.communicate(timeout=600)[1] for process in pair]
    assert [process.returncode for process in pair] == [HUNG, HUNG], said
    for text in said:
        assert "process 1 (" in text
        assert "hangs at loading the batch of step 4" in text
        assert "read_a_mount_that_is_gone" in text  # the stack of the one that hangs
    assert not (tmp_path / "run/final.npz").exists()

    port = free_port()
    pair = [launch(tmp_path / "run", 9, 0, i, 2, port, devices=2) for i in range(2)]
    outs = [process.communicate(timeout=600) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outs
    assert "resumed at step 3" in outs[0][1]
