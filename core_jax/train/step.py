"""The training step: a pure function `(state, frozen, batch) -> (state, metrics)`."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from core_jax.sharding import Rules, constrain, use_rules
from core_jax.train.state import TrainState

Tree = Any
Metrics = dict[str, jax.Array]
LossFn = Callable[[Tree, Tree, Tree, jax.Array], tuple[jax.Array, Metrics]]
StepFn = Callable[[TrainState, Tree, Tree], tuple[TrainState, Metrics]]

RESERVED = ("loss", "lr", "grad_norm", "param_norm", "update_norm", "nonfinite")


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[Any], jax.Array],
    *,
    grad_accum: int = 1,
    compute_dtype: Any = None,
    ema_decay: float | None = None,
    seed: int = 0,
    keyed_by_example: bool = False,
) -> StepFn:
    """Builds the step.

    `loss_fn(params, frozen, batch, key) -> (loss, metrics)` gets the trainable parameters in
    `compute_dtype`, differentiable; gradients arrive at the float32 masters. Its loss is a mean
    over the batch it sees. If that mean is over something else than examples (tokens, say), it
    returns their number as `metrics["weight"]`: micro-batches are then averaged with these
    weights, and gradient accumulation equals the full batch. The other metrics are scalars and
    are averaged with the same weights; `weight` is summed. A loss with several terms of
    different denominators takes these from the whole batch, which the data can carry as a
    scalar entry: scalars are passed to every micro-batch unchanged.

    Random keys are `fold_in(fold_in(key(seed), step), micro-batch)`, so a resumed run draws
    what an uninterrupted one does. Micro-batch `i` of `n` has the rows `i, i+n, ...`, which
    keeps every device's rows on that device.

    If the loss, the gradient norm or the update norm is not finite, the whole old state is
    returned, `step` included, and `metrics["nonfinite"]` is 1: the failing batch can then be
    replayed from the state as it is.

    Args:
        loss_fn: see above.
        optimizer: transformation of the gradients into updates.
        schedule: step -> learning rate, reported as `lr`.
        grad_accum: number of micro-batches; it must divide the batch.
        compute_dtype: dtype of the parameters that `loss_fn` gets; None leaves float32.
        ema_decay: decay of the moving average; it must be None iff `state.ema` is. The first
            steps use (1 + step) / (10 + step) where that is less, as diffusers' EMAModel and
            TensorFlow's ExponentialMovingAverage do: the random start is soon forgotten.
        seed: seed of the random keys.
        keyed_by_example: `loss_fn` folds a number of each example into its key, so that what an
            example draws does not depend on the rest of its batch. All micro-batches then get
            the step's key, and accumulation draws what the full batch does.

    Returns:
        The step. Its metrics are `loss_fn`'s and loss, lr, grad_norm (before clipping),
        param_norm, update_norm, nonfinite: float32 scalars.
    """
    if grad_accum < 1:
        raise ValueError(f"grad_accum={grad_accum} must be at least 1")

    def micro_step(params: Tree, frozen: Tree, batch: Tree, key: jax.Array) -> tuple[Tree, Metrics]:
        def of_masters(params: Tree) -> tuple[jax.Array, Metrics]:
            loss, metrics = loss_fn(_cast(params, compute_dtype), frozen, batch, key)
            return loss.astype(jnp.float32), metrics

        (loss, metrics), grads = jax.value_and_grad(of_masters, has_aux=True)(params)
        return grads, _checked(loss, metrics)

    def step(state: TrainState, frozen: Tree, batch: Tree) -> tuple[TrainState, Metrics]:
        if (ema_decay is None) != (state.ema is None):
            raise ValueError("ema_decay and init_state(ema=...) must both be set or both not")
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def key_of(micro: Any) -> jax.Array:
            return jax.random.clone(key) if keyed_by_example else jax.random.fold_in(key, micro)

        if grad_accum == 1:
            grads, metrics = micro_step(state.params, frozen, batch, key_of(0))
        else:
            grads, metrics = _accumulate(
                micro_step, state.params, frozen, batch, key_of, grad_accum
            )
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        update_norm = optax.tree.norm(updates)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema_decay is not None:
            rate = 1 - _warm_decay(ema_decay, state.step)
            ema = jax.tree.map(lambda e, p: e + rate * (p - e), ema, params)
        new = TrainState(step=state.step + 1, params=params, opt_state=opt_state, ema=ema)

        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm) & jnp.isfinite(update_norm)
        kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        metrics = metrics | {
            "lr": jnp.asarray(schedule(state.step), jnp.float32),
            "grad_norm": grad_norm,
            "param_norm": optax.tree.norm(kept.params),
            "update_norm": update_norm,
            "nonfinite": 1.0 - finite.astype(jnp.float32),
        }
        return kept, metrics

    return step


def _warm_decay(decay: float, step: jax.Array) -> jax.Array:
    step = step.astype(jnp.float32)
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def _cast(tree: Tree, dtype: Any) -> Tree:
    if dtype is None:
        return tree
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def _checked(loss: jax.Array, metrics: Metrics) -> Metrics:
    """Adds the loss to the metrics, all of them float32 scalars."""
    if taken := sorted(set(metrics) & set(RESERVED)):
        raise ValueError(f"loss_fn may not return the metrics {taken}; the step sets them")
    if shaped := {name: jnp.shape(x) for name, x in metrics.items() if jnp.ndim(x)}:
        raise ValueError(f"loss_fn's metrics must be scalars, got shapes {shaped}")
    if loss.ndim:
        raise ValueError(f"loss_fn's loss must be a scalar, got shape {loss.shape}")
    return {"loss": loss} | {name: jnp.asarray(x, jnp.float32) for name, x in metrics.items()}


def _split_batch(batch: Tree, n: int) -> Tree:
    """`[B, ...] -> [n, B/n, ...]`, micro-batch `i` holding the rows `i, i+n, ...`."""

    def one(x: jax.Array) -> jax.Array:
        if x.ndim == 0:
            return jnp.broadcast_to(x, (n,))
        if x.shape[0] % n:
            raise ValueError(f"grad_accum={n} does not divide the batch of {x.shape[0]} examples")
        x = x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1)
        return constrain(x, None, "batch", *[None] * (x.ndim - 2))

    return jax.tree.map(one, batch)


def _accumulate(
    micro_step: Callable[..., tuple[Tree, Metrics]],
    params: Tree,
    frozen: Tree,
    batch: Tree,
    key_of: Callable[[Any], jax.Array],
    n: int,
) -> tuple[Tree, Metrics]:
    """Weighted means of the gradients and metrics of `n` micro-batches, one after another."""

    def body(carry: tuple[Tree, Metrics], xs: tuple[jax.Array, Tree]) -> tuple[Any, None]:
        index, micro = xs
        grads, metrics = micro_step(params, frozen, micro, key_of(index))
        weight: Any = metrics.get("weight", jnp.float32(1.0))
        metrics = {k: weight if k == "weight" else weight * v for k, v in metrics.items()}
        add = jax.tree.map(jnp.add, carry[1:], (jax.tree.map(lambda g: weight * g, grads), metrics))
        return (carry[0] + weight, *add), None

    micros = _split_batch(batch, n)
    first = jax.tree.map(lambda x: x[0], micros)
    shapes = jax.eval_shape(micro_step, params, frozen, first, jax.random.key(0))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (total, grads, sums), _ = jax.lax.scan(
        body, (jnp.float32(0.0), *zeros), (jnp.arange(n), micros)
    )
    # All weights zero (no token supervised): a zero gradient, not 0/0.
    scale = jnp.where(total == 0, 0.0, 1.0 / jnp.where(total == 0, 1.0, total))
    grads = jax.tree.map(lambda g: scale * g, grads)
    return grads, {k: v if k == "weight" else scale * v for k, v in sums.items()}


def jit_train_step(
    step: StepFn,
    state_shardings: TrainState,
    frozen_shardings: Tree,
    batch_shardings: Tree,
    mesh: Mesh,
    rules: Rules | None = None,
) -> Any:
    """Compiles the step for a mesh; only the state is donated.

    Args:
        step: result of `make_train_step`.
        state_shardings: a `TrainState` of shardings.
        frozen_shardings: tree of shardings of the frozen parameters.
        batch_shardings: one sharding for all batch arrays, a tree of them, or None to take them
            as they arrive (a batch with scalars, which can't be split).
        mesh: the mesh, visible to `constrain` inside the step whether or not the caller has
            set one.
        rules: the rules of `constrain` inside the step; by default those in force around the
            first call.

    Returns:
        The jitted step, with the arguments of `step`. Metrics are replicated.
    """

    def on_mesh(state: TrainState, frozen: Tree, batch: Tree) -> tuple[TrainState, Metrics]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(jax.sharding.use_abstract_mesh(mesh.abstract_mesh))
            if rules is not None:
                stack.enter_context(use_rules(rules))
            return step(state, frozen, batch)

    return jax.jit(
        on_mesh,
        in_shardings=(state_shardings, frozen_shardings, batch_shardings),
        out_shardings=(state_shardings, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=(0,),
    )
