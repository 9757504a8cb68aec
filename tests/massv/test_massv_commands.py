"""The command lines: train, export; mistakes end with one line."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from PIL import Image

from core_jax.commands import config_names
from massv_jax.experiment import Experiment
from massv_jax.loading import is_drafter, load_drafter
from tests.massv import tiny_pairs

ROOT = pathlib.Path(__file__).parents[2]


def run(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_names_of_every_group_are_known():
    names = config_names(Experiment)
    wanted = {"run.steps", "optimizer.learning_rate", "data.answers", "distill.greedy_fraction"}
    assert wanted <= names
    assert "DataConfig" not in names


@pytest.mark.slow
def test_commands_train_and_export(qwen_pair, tmp_path):
    for i, picture in enumerate(tiny_pairs.pictures(4)):
        Image.fromarray(picture).resize((48, 40)).save(tmp_path / f"{i}.png")
    spoken = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a mat"}]
    records = [{"id": i, "image": f"{i}.png", "conversations": spoken} for i in range(4)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    flags = [
        "--config", ROOT / "configs" / "massv_phase1.py:mini", "--workdir", tmp_path / "run",
        f"--config.model.target={qwen_pair.target}",
        f"--config.model.language_model={qwen_pair.language_model}",
        f"--config.data.source.path={tmp_path / 'data.json'}",
        f"--config.data.source.images={tmp_path}", "--config.data.image_windows=12",
        "--config.data.batch_size=2", "--config.run.steps=2",
        "--config.optimizer.warmup_steps=0",
    ]  # fmt: skip
    code, _, error = run("massv_jax.train", *flags, "--config.run.stesp=3")
    assert code == 1
    assert "did you mean 'run.steps'" in error
    code, out, error = run("massv_jax.train", *flags)
    assert code == 0, error
    assert "[[a mat" in out
    code, out, error = run("massv_jax.export", "--workdir", tmp_path / "run",
                           "--out", tmp_path / "out")  # fmt: skip
    assert code == 0, error
    assert "stock hub directory" in out
    assert is_drafter(tmp_path / "out")
    assert load_drafter(tmp_path / "out", qwen_pair.target).drafter.config.kind == "merger"
    code, _, error = run("massv_jax.export", "--workdir", tmp_path, "--out", tmp_path / "no")
    assert code == 1
    assert error.startswith("error: ")
