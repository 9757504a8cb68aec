import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_jax.sharding import (
    DEFAULT_RULES,
    batch_sharding,
    constrain,
    make_mesh,
    param_shardings,
    replicated,
)
from core_jax.train.state import create_state, init_state
from core_jax.train.step import jit_train_step, make_train_step
from tests.core.train import tiny_problem as tiny


def run(step, state, num=3, start=0):
    step = jax.jit(step)
    for i in range(start, start + num):
        state, metrics = step(state, tiny.frozen(), tiny.batch(i))
    return state, metrics


def test_loss_falls_and_metrics_are_complete():
    step, state, _ = tiny.setup(tiny.loss_fn)
    first = run(step, state, 1)[1]
    _, last = run(step, state, 20)
    assert last["loss"] < 0.8 * first["loss"]
    names = {"loss", "lr", "grad_norm", "param_norm", "update_norm", "nonfinite", "weight", "error"}
    assert set(last) == names
    assert last["weight"] == tiny.batch(19)["mask"].sum()
    assert last["error"] == last["loss"]


def test_first_update_equals_a_hand_written_one():
    config = tiny.OptimizerConfig(
        name="sgd", b1=0.0, learning_rate=0.5, schedule="constant", clip_norm=None
    )
    step, state, _ = tiny.setup(tiny.loss_fn, config)
    new, _ = run(step, state, 1)
    grads = jax.grad(lambda p: tiny.loss_fn(p, tiny.frozen(), tiny.batch(0), None)[0])(state.params)
    want = jax.tree.map(lambda p, g: p - 0.5 * g, state.params, grads)
    assert tiny.max_difference(new.params, want) < 1e-6


@pytest.mark.parametrize(
    "shape", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "tensor": 2}]
)
def test_sharded_equals_unsharded(shape):
    step, state, optimizer = tiny.setup(ema_decay=0.9)
    want, want_metrics = run(step, state)

    mesh = make_mesh(shape)
    shardings = param_shardings(tiny.params(), tiny.PARAM_AXES, DEFAULT_RULES, mesh)
    state, all_shardings = create_state(
        tiny.params(), optimizer, param_shardings=shardings, mesh=mesh, ema=True
    )
    frozen = jax.device_put(tiny.frozen(), replicated(tiny.frozen(), mesh))
    rows = batch_sharding(mesh)
    jitted = jit_train_step(step, all_shardings, replicated(frozen, mesh), rows, mesh)
    for i in range(3):
        state, metrics = jitted(state, frozen, jax.device_put(tiny.batch(i), rows))

    assert tiny.max_difference(state.params, want.params) < 2e-6
    assert tiny.max_difference(state.ema, want.ema) < 2e-6
    np.testing.assert_allclose(metrics["loss"], want_metrics["loss"], rtol=1e-5)
    # Control: one step more moves the parameters far more than the tolerance.
    assert tiny.max_difference(run(step, want, 1, 3)[0].params, want.params) > 2e-4
    kernel = state.params["up"]["kernel"]
    assert kernel.sharding == shardings["up"]["kernel"]
    # Moments lie where their parameters lie.
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == kernel.shape]
    assert [m.sharding for m in moments] == [kernel.sharding] * 2


@pytest.mark.parametrize("outer", [False, True])
def test_mesh_and_rules_reach_constrain_inside_the_step(outer):
    seen = []

    def loss_fn(params, frozen, batch, key):
        seen.append(not jax.sharding.get_abstract_mesh().empty)
        x = constrain(batch["x"], "rows", None)
        return tiny.loss_fn(params, frozen, batch | {"x": x}, key)

    step, _, optimizer = tiny.setup(loss_fn)
    mesh = make_mesh({"data": 8})
    shardings = replicated(tiny.params(), mesh)
    state, all_shardings = create_state(
        tiny.params(), optimizer, param_shardings=shardings, mesh=mesh
    )
    rows = {"rows": "data"}
    jitted = jit_train_step(step, all_shardings, None, batch_sharding(mesh), mesh, rows)
    with jax.set_mesh(mesh) if outer else contextlib.nullcontext():
        jitted.lower(state, tiny.frozen(), tiny.batch(0))
    assert seen
    assert all(seen)


def test_grad_accumulation_equals_the_full_batch():
    full, state, _ = tiny.setup(tiny.loss_fn)
    accum, _, _ = tiny.setup(tiny.loss_fn, grad_accum=4)
    a, a_metrics = run(full, state)
    b, b_metrics = run(accum, state)
    assert tiny.max_difference(a.params, b.params) < 1e-6
    for name in a_metrics:
        np.testing.assert_allclose(a_metrics[name], b_metrics[name], rtol=1e-5, err_msg=name)


def test_grad_accumulation_without_the_weight_differs():
    """The control of the test above: unweighted micro-batches are not the full batch."""

    def unweighted(*args):
        loss, metrics = tiny.loss_fn(*args)
        return loss, {"error": metrics["error"]}

    full, state, _ = tiny.setup(unweighted)
    accum, _, _ = tiny.setup(unweighted, grad_accum=4)
    assert tiny.max_difference(run(full, state)[0].params, run(accum, state)[0].params) > 1e-4


def test_grad_accumulation_with_no_supervised_token():
    step, state, _ = tiny.setup(tiny.loss_fn, grad_accum=4)
    batch = tiny.batch(0) | {"mask": np.zeros(tiny.BATCH, np.float32)}
    _, metrics = jax.jit(step)(state, tiny.frozen(), batch)
    assert metrics["nonfinite"] == 0
    assert metrics["grad_norm"] == 0
    assert metrics["loss"] == 0


def make_key_probe(n):
    """A step whose loss depends on the key alone."""

    def loss_fn(params, frozen, batch, key):
        return (params["w"] * jax.random.normal(key)).sum(), {}

    config = tiny.OptimizerConfig(name="sgd", b1=0.0, clip_norm=None, schedule="constant")
    schedule = tiny.make_schedule(config)
    return make_train_step(loss_fn, tiny.make_optimizer(config), schedule, grad_accum=n, seed=3)


def key_probe_state():
    config = tiny.OptimizerConfig(name="sgd", b1=0.0, clip_norm=None, schedule="constant")
    state = init_state({"w": jnp.ones(())}, tiny.make_optimizer(config))
    return state, {}, {"x": np.zeros((4, 1), np.float32)}


def test_keys_follow_from_seed_step_and_micro_batch():
    def loss_at(n, step):
        state, frozen, batch = key_probe_state()
        state = state.replace(step=jnp.int32(step))
        return float(jax.jit(make_key_probe(n))(state, frozen, batch)[1]["loss"])

    def want(n, step):
        key = jax.random.fold_in(jax.random.key(3), step)
        return np.mean([float(jax.random.normal(jax.random.fold_in(key, i))) for i in range(n)])

    for n, step in [(1, 0), (1, 5), (4, 5)]:
        assert loss_at(n, step) == pytest.approx(want(n, step), rel=1e-5)
    assert len({loss_at(1, 0), loss_at(1, 5), loss_at(4, 5)}) == 3


def test_scalars_reach_every_micro_batch():
    def loss_fn(params, frozen, batch, key):
        loss, metrics = tiny.loss_fn(params, frozen, batch, key)
        return loss * batch["scale"], metrics

    full, state, _ = tiny.setup(loss_fn)
    accum, _, _ = tiny.setup(loss_fn, grad_accum=4)
    batch = tiny.batch(0) | {"scale": np.float32(3.0)}
    a = jax.jit(full)(state, tiny.frozen(), batch)[1]
    b = jax.jit(accum)(state, tiny.frozen(), batch)[1]
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-6)


def test_indivisible_grad_accumulation_raises():
    step, state, _ = tiny.setup(grad_accum=5)
    with pytest.raises(ValueError, match="grad_accum=5 does not divide the batch of 16"):
        jax.jit(step)(state, tiny.frozen(), tiny.batch(0))


def test_remat_changes_nothing():
    def rematted(params, frozen, batch, key):
        return jax.checkpoint(tiny.noisy_loss_fn)(params, frozen, batch, key)

    a, b = tiny.setup(tiny.noisy_loss_fn), tiny.setup(rematted)
    jaxpr = str(jax.make_jaxpr(b[0])(b[1], tiny.frozen(), tiny.batch(0)))
    assert "checkpoint" in jaxpr or "remat" in jaxpr
    assert tiny.max_difference(run(*a[:2])[0].params, run(*b[:2])[0].params) < 1e-6


def test_compute_dtype_casts_only_what_the_loss_sees():
    seen = {}

    def loss_fn(params, frozen, batch, key):
        seen.update(trainable=params["up"]["kernel"].dtype, frozen=frozen["tower"]["kernel"].dtype)
        return tiny.loss_fn(params, frozen, batch, key)

    step, state, _ = tiny.setup(loss_fn, compute_dtype=jnp.bfloat16)
    new, metrics = run(step, state, 1)
    assert seen == {"trainable": jnp.bfloat16, "frozen": jnp.float32}
    assert {x.dtype for x in jax.tree.leaves(new.params)} == {jnp.dtype("float32")}
    assert metrics["loss"].dtype == jnp.float32
    exact = run(*tiny.setup(tiny.loss_fn)[:2], 1)[1]
    np.testing.assert_allclose(metrics["loss"], exact["loss"], rtol=2e-2)


@pytest.mark.parametrize(("at_step", "decay"), [(0, 0.1), (10, 0.55), (1000, 0.75)])
def test_ema_follows_the_parameters(at_step, decay):
    """Quickly at first: after (1 + step) / (10 + step), until that reaches the decay."""
    step, state, _ = tiny.setup(ema_decay=0.75)
    assert state.ema["up"]["kernel"] is not state.params["up"]["kernel"]
    far = jax.tree.map(lambda p: p + 1.0, state.params)
    state = dataclasses.replace(state, step=jnp.int32(at_step), ema=far)
    new, _ = run(step, state, 1)
    want = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, far, new.params)
    assert tiny.max_difference(new.ema, want) < 1e-6
    assert tiny.max_difference(new.ema, new.params) > 1e-2


def test_ema_must_be_asked_for_twice():
    step, _, optimizer = tiny.setup(ema_decay=0.75)
    with pytest.raises(ValueError, match="ema_decay"):
        step(init_state(tiny.params(), optimizer), tiny.frozen(), tiny.batch(0))


@pytest.mark.parametrize("grad_accum", [1, 4])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_step_keeps_the_whole_old_state(where, grad_accum):
    def loss_fn(params, frozen, batch, key):
        loss, metrics = tiny.loss_fn(params, frozen, batch, key)
        if where == "loss":
            return jnp.where(batch["bad"].sum() > 0, jnp.nan, loss), metrics
        # A finite loss with an infinite gradient.
        zero = (params["up"]["bias"] - jax.lax.stop_gradient(params["up"]["bias"])).sum()
        return jax.lax.cond(
            batch["bad"].sum() > 0, lambda: loss + jnp.sqrt(zero), lambda: loss
        ), metrics

    step, state, _ = tiny.setup(loss_fn, ema_decay=0.9, grad_accum=grad_accum)
    step = jax.jit(step)
    # One bad row of the last micro-batch only.
    flags = np.eye(tiny.BATCH, dtype=np.float32)[-1]
    state, metrics = step(state, tiny.frozen(), tiny.batch(0) | {"bad": 0 * flags})
    assert metrics["nonfinite"] == 0
    assert state.step == 1
    kept, metrics = step(state, tiny.frozen(), tiny.batch(1) | {"bad": flags})
    assert metrics["nonfinite"] == 1
    tiny.assert_equal(kept, state)
    if where == "gradient":
        assert np.isfinite(metrics["loss"])


def test_optimizer_state_covers_trainables_only():
    _, state, _ = tiny.setup()
    scalars = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert scalars == 2 * sum(x.size for x in jax.tree.leaves(state.params))


def test_init_state_copies_so_that_donation_spares_the_parameters():
    step, _, optimizer = tiny.setup(ema_decay=0.9)
    params = tiny.params()
    state = init_state(params, optimizer, ema=True)
    jax.jit(step, donate_argnums=0)(state, tiny.frozen(), tiny.batch(0))
    assert state.params["up"]["kernel"].is_deleted()
    assert not any(x.is_deleted() for x in jax.tree.leaves(params))


def test_donation_takes_the_state_and_nothing_else():
    step, _, optimizer = tiny.setup()
    mesh = make_mesh({"data": 8})
    params = jax.device_put(tiny.params(), replicated(tiny.params(), mesh))
    frozen = jax.device_put(tiny.frozen(), replicated(tiny.frozen(), mesh))
    state, shardings = create_state(
        params, optimizer, param_shardings=replicated(params, mesh), mesh=mesh
    )
    batch = jax.device_put(tiny.batch(0), batch_sharding(mesh))
    jitted = jit_train_step(step, shardings, replicated(frozen, mesh), batch_sharding(mesh), mesh)
    jitted(state, frozen, batch)
    assert state.params["up"]["kernel"].is_deleted()
    for kept in (params, frozen, batch):
        assert not any(x.is_deleted() for x in jax.tree.leaves(kept))


@pytest.mark.parametrize(
    ("extra", "message"),
    [({"lr": 1.0}, r"\['lr'\]"), ({"per_row": np.zeros(3)}, r"must be scalars.*per_row")],
)
def test_bad_metrics_raise(extra, message):
    def loss_fn(*args):
        loss, metrics = tiny.loss_fn(*args)
        return loss, metrics | extra

    step, state, _ = tiny.setup(loss_fn)
    with pytest.raises(ValueError, match=message):
        step(state, tiny.frozen(), tiny.batch(0))
