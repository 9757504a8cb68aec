"""A job as shapes is the job that training runs."""

import jax
import numpy as np
import pytest

from core_jax.config import to_dataclass
from core_jax.sharding import make_mesh
from vlv_jax.experiment import Experiment
from vlv_jax.planning import abstract_job, step_flops
from vlv_jax.training import build_job, training_batches


def kinds(tree):
    return jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)


def places(tree):
    return jax.tree.map(lambda x: x.sharding, tree)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_arguments_and_program_are_those_of_the_job(tiny_hub, stage):
    values = tiny_hub.experiment(stage=stage, mesh={"data": 1, "fsdp": -1}, ema_decay=0.9)
    experiment = to_dataclass(Experiment, values)
    job = build_job(experiment)
    planned = abstract_job(experiment, make_mesh(experiment.run.mesh))
    state, frozen, batch = planned.arguments
    assert kinds(state) == kinds(job.state)
    assert kinds(frozen) == kinds(job.frozen)
    assert places(state) == places(job.state)
    assert places(frozen) == places(job.frozen)
    real = next(training_batches(experiment, job.pieces, 0))
    arrays = {k: np.asarray(v) for k, v in real.items() if k != "ids"}
    assert kinds(batch) == kinds(arrays)
    assert places(batch) == dict.fromkeys(batch, job.sharding)
    given = jax.device_put(arrays, job.sharding)
    theirs = job.step_fn.lower(job.state, job.frozen, given).as_text()
    assert planned.placed.step_fn.lower(*planned.arguments).as_text() == theirs


def test_the_batch_of_both_losses_has_both_views(tiny_hub):
    values = tiny_hub.experiment(stage=2)
    values["captioning"] = {"reconstruction_weight": 1.0}
    experiment = to_dataclass(Experiment, values)
    batch = abstract_job(experiment, make_mesh({"data": -1})).arguments[2]
    assert batch.keys() == {"index", "image", "florence_image", "tokens", "supervised"}


def test_the_arithmetic_of_a_step_is_that_of_nothing_computed_twice(tiny_hub):
    values = tiny_hub.experiment(stage=2)
    plain = to_dataclass(Experiment, values)
    values["model"]["execution"] = {"remat": "full"}
    remat = to_dataclass(Experiment, values)
    mesh = make_mesh(plain.run.mesh)
    once, twice = (abstract_job(e, mesh).program.flops() for e in (plain, remat))
    assert twice > once
    assert step_flops(remat) == step_flops(plain) == once


def test_cached_features_take_the_place_of_images(tiny_hub):
    values = tiny_hub.experiment(stage=1)
    values["data"]["cache"] = "somewhere"
    experiment = to_dataclass(Experiment, values)
    _, frozen, batch = abstract_job(experiment, make_mesh({"data": -1})).arguments
    assert batch.keys() == {"index", "features", "latent_mean", "latent_logvar"}
    assert batch["features"].ndim == 3
    assert "vae" not in frozen
