"""Layouts that make sense, read from compiled programs of a small job."""

import jax
import jax.numpy as jnp
import pytest

from core_jax.train.optimizer import OptimizerConfig
from core_jax.train.placement import AbstractJob, place_step
from launch.jobs import PlannedJob
from launch.planning import make_plan
from launch.topology import has_libtpu, parse_topology, prepare_environment
from tests.launch.test_planning import WIDTH, Tiny

LAYERS = 6
pytestmark = [
    pytest.mark.slow, pytest.mark.skipif(not has_libtpu(), reason="libtpu is not installed"),
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def environment():
    prepare_environment()


def layers_job(*, at_once=False, **changes):
    """Frozen layers under a trained one; `at_once` lays them out whole before the first runs."""

    def abstract(experiment, mesh):
        def loss(params, frozen, batch, key):
            del key
            stack = frozen["layers"]
            if at_once:
                stack = jax.lax.with_sharding_constraint(stack, jax.sharding.PartitionSpec())
                stack = jax.lax.optimization_barrier(stack)
            h = jax.lax.scan(lambda h, w: (jax.nn.gelu(h @ w), None), batch["x"], stack)[0]
            return jnp.mean(jnp.square((h @ params["out"]).astype(jnp.float32))), {}

        trained = {"out": jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)}
        frozen = {"layers": jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.bfloat16)}
        batch = {"x": jax.ShapeDtypeStruct((experiment.data.batch_size, WIDTH), jnp.bfloat16)}
        placed = place_step(
            loss, trained, frozen, mesh=mesh, optimizer=OptimizerConfig(), grad_accum=1,
            compute_dtype="bfloat16", ema_decay=None, seed=0,
        )  # fmt: skip
        return AbstractJob(placed, placed.abstract_arguments(frozen, batch))

    made = PlannedJob(name="layers", experiment=Tiny(), abstract=abstract, units={"rows": 64})
    return made.changed({name.replace("__", "."): value for name, value in changes.items()})


def problems(**options):
    return make_plan(layers_job(**options), parse_topology("v5e:2x2"), config="layers").layout


def test_weights_are_gathered_layer_by_layer_and_the_optimizer_is_split():
    assert problems() == ()


def test_a_gather_of_all_frozen_weights_is_found():
    (found,) = problems(at_once=True)
    assert "12 MiB of frozen weights on every device at once" in found


def test_a_replicated_optimizer_is_found():
    (found,) = problems(run__mesh={"data": -1, "fsdp": 1})
    assert "every device holds 8 MiB of the optimizer's 8 MiB whole" in found
