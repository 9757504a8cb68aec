"""A job as shapes is the job that training runs."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from core_jax.config import ConfigError, to_dataclass
from core_jax.sharding import make_mesh
from massv_jax.experiment import Experiment
from massv_jax.planning import abstract_job, step_flops
from massv_jax.training import build_job, make_rows, open_training_source, training_batches
from tests.massv import tiny_pairs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llava")
    said = [{"from": "human", "value": "<image>\nwhat is it?"},
            {"from": "gpt", "value": "a red circle"}]  # fmt: skip
    records = []
    for i, picture in enumerate(tiny_pairs.pictures(4)):
        Image.fromarray(picture).save(path / f"{i}.png")
        records.append({"id": str(i), "image": f"{i}.png", "conversations": said})
    (path / "data.json").write_text(json.dumps(records))
    return path


def values(target, language_model, folder, task, model=None, loss=None):
    return {
        "task": task,
        "model": {"target": str(target), "language_model": str(language_model),
                  "frozen_dtype": "bfloat16", "compute_dtype": "float32", **(model or {})},
        "data": {
            "source": {"kind": "llava", "path": str(folder / "data.json")},
            "batch_size": 8, "max_length": 96, "image_windows": 12, "num_threads": 1,
            "limits": {"min_side": 8},
        },
        "run": {"steps": 2, "seed": 1, "mesh": {"data": 1, "fsdp": -1}},
        "optimizer": {"learning_rate": 1e-3, "total_steps": 10},
        "loss": loss or {},
    }  # fmt: skip


def kinds(tree):
    return jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)


def places(tree):
    return jax.tree.map(lambda x: x.sharding, tree)


TEACHER = {"ce": 1.0, "kl": 1.0, "teacher": "target"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "task", "model", "loss"),
    [
        ("qwen", "phase1", {}, {}),
        ("qwen", "phase2", {"pooling": 2}, TEACHER),
        ("qwen", "phase2", {"kind": "text"}, TEACHER),
        ("qwen", "phase2", {"kind": "mlp"}, {}),
        ("gemma", "phase2", {}, TEACHER),
    ],
    ids=["merger", "pooled", "text", "mlp", "gemma"],
)
def test_arguments_and_program_are_those_of_the_job(
    request, folder, family, task, model, loss
):
    pair = request.getfixturevalue(f"{family}_pair")
    given = values(pair.target, pair.language_model, folder, task, model, loss)
    experiment = to_dataclass(Experiment, given)
    job = build_job(experiment)
    planned = abstract_job(experiment, make_mesh(experiment.run.mesh))
    state, frozen, batch = planned.arguments
    assert kinds(state) == kinds(job.state)
    assert kinds(frozen) == kinds(job.frozen)
    assert places(state) == places(job.state)
    assert places(frozen) == places(job.frozen)
    source = open_training_source(experiment, job.parts.binding)
    rows = make_rows(experiment, job.parts, job.processor)
    real = next(training_batches(experiment, source, rows, 0))
    arrays = {k: np.asarray(v) for k, v in real.items() if k != "ids"}
    assert kinds(batch) == kinds(arrays)
    on_devices = jax.device_put(arrays, job.sharding)
    theirs = job.step_fn.lower(job.state, job.frozen, on_devices).as_text()
    assert planned.placed.step_fn.lower(*planned.arguments).as_text() == theirs


def test_the_arithmetic_of_a_step_is_that_of_nothing_computed_twice(qwen_pair, folder):
    given = values(qwen_pair.target, qwen_pair.language_model, folder, "phase1")
    plain = to_dataclass(Experiment, given)
    given["model"]["execution"] = {"remat": "full"}
    remat = to_dataclass(Experiment, given)
    once, twice = (
        abstract_job(e, make_mesh(e.run.mesh)).program.flops() for e in (plain, remat)
    )  # fmt: skip
    assert twice > once
    assert step_flops(remat) == step_flops(plain) == once


def test_targets_that_no_plan_is_made_for_are_named(folder):
    mesh = make_mesh({"data": 1, "fsdp": -1})
    left = values("runs/vlv_captioner", "hub/Qwen/Qwen2.5-0.5B", folder, "phase1")
    with pytest.raises(ConfigError, match="is what a run leaves behind"):
        abstract_job(to_dataclass(Experiment, left), mesh)
    text = values("hub/Qwen/Qwen2.5-7B", "hub/Qwen/Qwen2.5-0.5B", folder, "phase1")
    with pytest.raises(ConfigError, match="of Qwen2Config"):
        abstract_job(to_dataclass(Experiment, text), mesh)
