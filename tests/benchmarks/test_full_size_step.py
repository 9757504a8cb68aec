"""The full-size step of the GPU script, as shapes: its operations, and that it is stage 1's."""

import functools

import jax
import jax.numpy as jnp
import pytest

from benchmarks import stage1_step
from core_jax.flops import count_flops
from core_jax.ops.execution import Execution
from core_jax.partition import count_parameters, split
from vlv_jax.stage1 import TRAINABLE, make_loss


@functools.cache
def _full():
    experiment = stage1_step.experiment_of("full")
    networks = stage1_step.networks_of("full", experiment.model.num_queries, Execution())
    return experiment, networks, stage1_step.abstract_params(networks)


def test_full_size_is_the_paper_s():
    experiment, networks, shapes = _full()
    assert experiment.model.compute_dtype == "bfloat16"
    assert networks.bridge.num_queries == 77
    trained, _ = split(shapes, TRAINABLE)
    assert abs(count_parameters(trained) / 1e6 - 357.0) < 0.5
    assert count_parameters(shapes["unet"]) == 865_910_724


@pytest.mark.slow
def test_operations_of_the_full_step():
    experiment, networks, shapes = _full()
    trained, frozen = split(shapes, TRAINABLE)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), stage1_step.random_batch(1, 384, 768)
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    loss = make_loss(networks, experiment.denoising)
    gradient = jax.value_and_grad(lambda *a: loss(*a)[0])
    forward = count_flops(lambda *a: loss(*a)[0], trained, frozen, batch, key)
    both = count_flops(gradient, trained, frozen, batch, key)
    assert jnp.isfinite(both)
    # The towers have no backward pass, the frozen U-Net has half of one.
    assert 1.3 * forward < both < 3 * forward
    assert 1e12 < both < 1e13
