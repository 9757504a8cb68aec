"""What a training run carries from step to step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Tree = Any


@struct.dataclass
class TrainState:
    """The whole state of a run; the data position and the random keys follow from `step`.

    Attributes:
        step: int32 scalar, number of updates made.
        params: trainable parameters only, float32 masters, a nested dict.
        opt_state: state of the optimizer, for the trainable parameters only.
        ema: exponential moving average of `params`, or None.
    """

    step: jax.Array
    params: Tree
    opt_state: Tree
    ema: Tree | None = None


def _master(leaf: jax.Array) -> jax.Array:
    # A copy, even in the same dtype: the step donates the state, and the caller's own arrays
    # must survive that.
    dtype = jnp.float32 if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype
    return jnp.array(leaf, dtype=dtype, copy=True)


def init_state(
    params: Tree, optimizer: optax.GradientTransformation, ema: bool = False
) -> TrainState:
    """Returns the state at step 0: float32 copies of `params`, fresh moments, and EMA if asked."""
    params = jax.tree.map(_master, params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params) if ema else None,
    )


def state_shardings(
    abstract_state: TrainState,
    param_shardings: Tree,
    mesh: Mesh,
) -> TrainState:
    """Shardings of a whole state: moments and EMA lie where their parameters lie.

    Args:
        abstract_state: shapes of the state, `jax.eval_shape` of `init_state`.
        param_shardings: tree of shardings of the trainable parameters.
        mesh: the mesh; counters and scalars are replicated over it.

    Returns:
        A `TrainState` of shardings.
    """
    one_copy = NamedSharding(mesh, PartitionSpec())
    shapes = {path: x.shape for path, x in _with_paths(abstract_state.params)}
    of_path = dict(_with_paths(param_shardings))

    def place(path: tuple[Any, ...], x: Any) -> NamedSharding:
        # A moment's path ends with its parameter's, however deep the optimizer keeps it.
        # optax.tree_utils.tree_map_params would replicate the moments of optimizers that treat
        # parameters differently (optax.partition, Muon).
        for i in range(len(path) + 1):
            if shapes.get(path[i:]) == x.shape:
                return of_path[path[i:]]
        return one_copy

    opt_state = jax.tree_util.tree_map_with_path(place, abstract_state.opt_state)
    return TrainState(
        step=one_copy,  # pyright: ignore[reportArgumentType] - a state of shardings
        params=param_shardings,
        opt_state=opt_state,
        ema=None if abstract_state.ema is None else param_shardings,
    )


def _with_paths(tree: Tree) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def create_state(
    params: Tree,
    optimizer: optax.GradientTransformation,
    *,
    param_shardings: Tree,
    mesh: Mesh,
    ema: bool = False,
) -> tuple[TrainState, TrainState]:
    """Builds the state directly in its shards.

    Args:
        params: trainable parameters, on the host or on devices; they stay valid.
        optimizer: the optimizer.
        param_shardings: tree of shardings like `params`.
        mesh: the mesh.
        ema: whether to keep a moving average.

    Returns:
        `(state, shardings)`, the second a `TrainState` of shardings.
    """

    def init(params: Tree) -> TrainState:
        return init_state(params, optimizer, ema)

    shardings = state_shardings(jax.eval_shape(init, params), param_shardings, mesh)
    return jax.jit(init, out_shardings=shardings)(params), shardings
