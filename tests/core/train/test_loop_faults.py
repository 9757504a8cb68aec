"""What the loop makes up for, and what it says, after something went wrong between steps."""

import threading

import pytest

from core_jax import watchdog
from core_jax.train.loop import Hook, LoopConfig, run_training
from core_jax.train.metrics import MultiWriter
from tests.core.train import tiny_problem as tiny
from tests.core.train.test_loop import train


@pytest.mark.parametrize("total", [4, 6])
def test_what_a_stopped_run_did_not_make_of_a_saved_step_is_made_up_for(tmp_path, total):
    made = set()
    hook = Hook(2, lambda step, state: made.add(step), is_done=lambda step: step in made)
    train(tmp_path, 4, hooks=[hook])
    made.remove(4)  # killed between the save of step 4 and its hooks
    train(tmp_path, total, hooks=[hook])
    assert made == {2, 4, *range(6, total + 1)}
    calls = []
    counted = Hook(2, lambda step, state: calls.append(step), is_done=lambda step: step in made)
    train(tmp_path, total, hooks=[counted])
    assert not calls


def test_a_hanging_loader_is_named(tmp_path, monkeypatch, capfd):
    released, ended = threading.Event(), []
    monkeypatch.setattr(watchdog, "_end", lambda text: (ended.append(text), released.set()))

    def hanging(start):
        for i, batch in enumerate(tiny.batches(start), start):
            if i == 2:
                released.wait(60)
            yield batch

    config = LoopConfig(total_steps=4, log_every=1, save_every=100, hang_seconds=4.0)
    step, state, _ = tiny.setup(ema_decay=0.9)
    result = run_training(
        config, state=state, step_fn=step, frozen=tiny.frozen(), make_batches=hanging,
        workdir=str(tmp_path), writers=MultiWriter([]),
    )  # fmt: skip
    assert result.step == 4
    assert "hangs at loading the batch of step 2" in ended[0]
    assert "in hanging" in capfd.readouterr().err
