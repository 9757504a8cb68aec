"""Where a training step puts parameters and batches on a mesh, "tensor" included."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from core_jax.sharding import make_mesh
from core_jax.train.placement import place_step
from tests.core.train import tiny_problem as tiny

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def placed(mesh, trainable):
    return place_step(
        tiny.loss_fn, trainable, tiny.frozen(), mesh=mesh, optimizer=tiny.CONFIG, grad_accum=1,
        compute_dtype=jnp.float32, ema_decay=None, seed=0,
    )  # fmt: skip


def test_devices_along_tensor_hold_the_same():
    """Parameters are split over fsdp and rows over data and fsdp; see docs/quickstart.md."""
    wide = {"kernel": jax.ShapeDtypeStruct((512, 1024), jnp.float32)}
    step = placed(make_mesh(MESH), wide)
    assert step.shardings.params["kernel"].spec == PartitionSpec(None, "fsdp")
    assert step.batch_sharding.spec == PartitionSpec(("data", "fsdp"))


def test_a_step_on_a_mesh_with_tensor_is_that_of_one_device():
    def after(mesh):
        step = placed(mesh, tiny.params())
        frozen = jax.device_put(tiny.frozen(), step.frozen_shardings)
        batch = jax.device_put(tiny.batch(0), step.batch_sharding)
        state, metrics = step.step_fn(step.create_state(tiny.params()), frozen, batch)
        return state.params, float(metrics["loss"])

    params, loss = after(make_mesh(MESH))
    wanted, wanted_loss = after(make_mesh({"data": 1}, jax.devices()[:1]))
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-6)
    assert tiny.max_difference(params, wanted) < 1e-6
    assert tiny.max_difference(params, tiny.params()) > 1e-4  # the control: it moved
