"""Both phases and distillation by real processes on localhost are those by one."""

import json

import numpy as np
import pytest
from PIL import Image

from core_jax.partition import flatten
from core_jax.train.checkpoint import load_params
from tests.local_processes import run
from tests.massv import tiny_pairs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eleven conversations: neither batches nor chunks come out even."""
    path = tmp_path_factory.mktemp("llava")
    spoken = [{"from": "human", "value": "<image>\nwhat is it?"},
              {"from": "gpt", "value": "a red circle"}]  # fmt: skip
    records = []
    for i, picture in enumerate(tiny_pairs.pictures(11)):
        Image.fromarray(picture).resize((48, 40)).save(path / f"{i}.png")
        records.append({"id": str(i), "image": f"{i}.png", "conversations": spoken})
    (path / "data.json").write_text(json.dumps(records))
    return path


def _experiment(pair, folder, task, **groups):
    made = {
        "task": task,
        "model": {
            "target": str(pair.target), "language_model": str(pair.language_model),
            "frozen_dtype": "float32", "compute_dtype": "float32",
        },
        "data": {
            "source": {"kind": "llava", "path": str(folder / "data.json"), "images": str(folder)},
            "batch_size": 8, "max_length": 96, "image_windows": 12, "num_threads": 1,
            "limits": {"min_side": 8}, "format": "plain" if task == "phase1" else "chat",
        },
        "run": {"steps": 2, "seed": 1, "log_every": 1, "save_every": 1000,
                "mesh": {"data": 2, "fsdp": -1}},
        # A bias of keys has no gradient but rounding, which Adam would make as large as any.
        "optimizer": {"learning_rate": 1e-3, "total_steps": 10, "eps": 1e-4},
    }  # fmt: skip
    for name, values in groups.items():
        made[name] = made.get(name, {}) | values
    return made


def _config(experiment, file):
    file.write_text(json.dumps(experiment))
    return f"tests/vlv/json_config.py:{file}"


def _train(experiment, workdir, processes):
    config = _config(experiment, workdir.with_suffix(".json"))
    run("massv_jax.train", processes=processes, config=config, workdir=workdir)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return flatten(load_params(str(workdir), ema=False)), rows


@pytest.mark.parametrize("task", ["phase1", "phase2"])
def test_two_steps_of_two_processes_are_those_of_one(qwen_pair, folder, tmp_path, task):
    loss = {"loss": {"teacher": "target", "kl": 1.0}} if task == "phase2" else {}
    experiment = _experiment(qwen_pair, folder, task, **loss)
    params, rows = _train(experiment, tmp_path / "one", 1)
    together, others = _train(experiment, tmp_path / "two", 2)
    assert together.keys() == params.keys()
    for name, leaf in params.items():
        np.testing.assert_allclose(together[name], leaf, rtol=0, atol=2e-5, err_msg=name)
    # As many rows: process 0 alone writes.
    np.testing.assert_allclose(
        [row["loss"] for row in others], [row["loss"] for row in rows], rtol=1e-4
    )


def test_distillation_by_two_processes_gives_the_bytes_of_one(qwen_pair, folder, tmp_path):
    """As many rows a device and as many devices a process: of that alone answers may depend."""
    distill = {"chunk_size": 2, "batch_size": 1, "max_new_tokens": 6, "prompt_lengths": (64, 96)}
    experiment = _experiment(qwen_pair, folder, "distill", distill=distill)
    experiment["run"] = {"mesh": {"data": -1}}
    config = _config(experiment, tmp_path / "distill.json")
    made = []
    for count in (1, 2):
        out = tmp_path / f"by-{count}"
        run("massv_jax.distill", f"--out={out}", processes=count, devices=2 * count,
            config=config)  # fmt: skip
        files = [file for file in sorted(out.rglob("*")) if file.is_file()]
        made.append({file.relative_to(out): file.read_bytes() for file in files})
    assert made[0] == made[1]
    assert made[0][next(p for p in made[0] if p.name == "answers.jsonl")].count(b"\n") == 11


def test_an_evaluation_by_two_processes_gives_the_bytes_of_one(qwen_pair, folder, tmp_path):
    evaluation = {
        "source": {"kind": "llava", "path": str(folder / "data.json"), "images": str(folder)},
        "num_prompts": 5, "gammas": (2,), "temperatures": (0.0,), "min_answer_tokens": 0,
        "bootstrap_samples": 20, "num_timed": 0,
    }  # fmt: skip
    decoding = {"batch_size": 2, "max_new_tokens": 6, "gamma": 2, "prompt_lengths": (64, 96)}
    experiment = _experiment(qwen_pair, folder, "eval", evaluation=evaluation, decoding=decoding)
    experiment["run"] = {"mesh": {"data": -1}}
    config = _config(experiment, tmp_path / "eval.json")
    made = []
    for count in (1, 2):
        out = tmp_path / f"by-{count}"
        said = run("massv_jax.evaluate", f"--out={out}", "--arm=text", "--arm=lookup",
                   processes=count, devices=count, config=config)  # fmt: skip
        assert said.count("wrote ") == 1
        report = json.loads((out / "report.json").read_text())
        lines = (out / "evaluated_acceptance.jsonl").read_bytes()
        assert lines.count(b"\n") == 10
        made.append((report["massv"], lines))
    assert made[0] == made[1]
