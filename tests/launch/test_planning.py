"""Whole plans of a tiny job, compiled for a TPU topology where libtpu is installed."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from core_jax.ops.execution import Execution
from core_jax.train.optimizer import OptimizerConfig
from core_jax.train.placement import AbstractJob, place_step
from launch.chips import CHIPS
from launch.errors import PlanError
from launch.fitting import fit_batch
from launch.jobs import PlannedJob
from launch.plan_text import as_html, as_text
from launch.planning import make_gpu_plan, make_plan
from launch.remedies import try_remedies
from launch.topology import has_libtpu, parse_topology, prepare_environment, topology_devices

WIDTH = 1024
needs_libtpu = pytest.mark.skipif(not has_libtpu(), reason="libtpu is not installed")


@dataclasses.dataclass(frozen=True)
class Model:
    execution: Execution = Execution()


@dataclasses.dataclass(frozen=True)
class Data:
    batch_size: int = 64
    length: int = 1


@dataclasses.dataclass(frozen=True)
class Run:
    mesh: Any = dataclasses.field(default_factory=lambda: {"data": 1, "fsdp": -1})
    grad_accum: int = 1
    steps: int = 10


@dataclasses.dataclass(frozen=True)
class Tiny:
    model: Model = Model()
    data: Data = Data()
    run: Run = dataclasses.field(default_factory=Run)


def abstract(experiment, mesh):
    """Two layers of which one is frozen; a row is [length, WIDTH]."""

    def loss(params, frozen, batch, key):
        del key
        h = jax.nn.gelu(batch["x"] @ frozen["in"])
        return jnp.mean(jnp.square((h @ params["out"]).astype(jnp.float32))), {}

    square = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)
    half = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.bfloat16)
    shape = (experiment.data.batch_size, experiment.data.length, WIDTH)
    placed = place_step(
        loss, {"out": square}, {"in": half}, mesh=mesh, optimizer=OptimizerConfig(),
        grad_accum=experiment.run.grad_accum, compute_dtype="bfloat16", ema_decay=None, seed=0,
    )  # fmt: skip
    batch = {"x": jax.ShapeDtypeStruct(shape, jnp.bfloat16)}
    return AbstractJob(placed, placed.abstract_arguments({"in": half}, batch))


def job(**changes):
    tiny = PlannedJob(name="tiny", experiment=Tiny(), abstract=abstract, units={"rows": 64})
    return tiny.changed({name.replace("__", "."): value for name, value in changes.items()})


@pytest.fixture(scope="module", autouse=True)
def environment():
    prepare_environment()


def test_a_gpu_s_plan_needs_no_compiler():
    plan = make_gpu_plan(job(), CHIPS["h200"], config="tiny", price_per_chip_hour=3.6)
    assert plan.fits is None
    assert plan.memory.frozen == 2 * WIDTH**2
    assert plan.memory.trained == 4 * WIDTH**2
    assert plan.memory.optimizer - 2 * plan.memory.trained < 64  # and two counters
    assert plan.memory.batch == 64 * WIDTH * 2
    # Two products forward, one back to the trained weights.
    assert plan.model_flops == plan.lowered.traced_flops == 3 * 2 * 64 * WIDTH**2
    assert "not compiled" in as_text(plan)
    assert json.loads(json.dumps(plan.to_json()))["memory"]["frozen"] == 2 * WIDTH**2


@needs_libtpu
@pytest.mark.slow
def test_a_plan_of_four_chips():
    topology = parse_topology("v5e:2x2")
    plan = make_plan(job(), topology, config="tiny", price_per_chip_hour=1.0)
    assert plan.fits
    assert plan.memory.trained == WIDTH**2  # float32, over four chips
    assert plan.lowered.replicated_optimizer < 64
    assert plan.memory.headroom > 15 * 2**30
    assert plan.compiled is not None
    assert plan.compiled.cost is not None
    assert plan.compiled.cost.flops == pytest.approx(plan.model_flops / 4, rel=0.01)
    assert {c.axes for c in plan.compiled.collectives} == {("fsdp",)}
    assert plan.roofline is not None
    assert plan.run is not None
    content = json.loads(json.dumps(plan.to_json()))
    assert content["fits"] is True
    assert content["lowered"]["fingerprint"] == plan.lowered.fingerprint
    assert "fits" in as_text(plan)
    assert "<script" not in as_html(plan)
    again = make_plan(job(), topology, config="tiny")
    assert again.lowered.fingerprint == plan.lowered.fingerprint


@needs_libtpu
@pytest.mark.slow
def test_out_of_memory_is_a_plan_with_remedies_and_a_batch_that_fits():
    topology = parse_topology("v5e:2x2")
    # 6 GiB of a batch a device, and twice as much of what is made of it.
    large = job(data__length=3 * 2**16)
    plan = make_plan(large, topology, config="tiny")
    assert plan.fits is False
    assert plan.memory.headroom < 0
    assert "DOES NOT FIT" in as_text(plan)
    tried = try_remedies(large, topology, plan, "low", 4)
    assert [dict(r.changes) for r in tried][:1] == [{"model.execution.remat": "full"}]
    assert [r.fits for r in tried[:-1]] == [False] * (len(tried) - 1)
    assert tried[-1].fits
    found = fit_batch(large, topology, plan, "low")
    assert 0 < found.largest < 16
    assert dict((b, ok) for b, _, ok in found.tried)[found.largest]


@needs_libtpu
@pytest.mark.slow
def test_what_does_not_go_together_is_named():
    with pytest.raises(PlanError, match="does not divide into 4 parts"):
        make_plan(job(data__batch_size=63), parse_topology("v5e:2x2"), config="tiny")
    with pytest.raises(PlanError, match=r"config\.run\.mesh"):
        make_plan(job(run__mesh={"data": 3}), parse_topology("v5e:2x2"), config="tiny")
    with pytest.raises(PlanError, match="does not build the topology"):
        topology_devices(parse_topology("v5e:1x3"))
