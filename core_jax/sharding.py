"""Meshes and shardings as data: parameter path -> logical axes -> mesh axes.

A model lists the logical axes of its parameters (`PARAM_AXES`), a config says which mesh axes
they lie on (`rules`). Nothing here knows Flax. Meshes are always of Auto type: the compiler
propagates shardings, and `constrain` is a hint to it.
"""

import contextlib
import contextvars
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from core_jax.config import ConfigError
from core_jax.partition import path_str

MESH_AXES = ("data", "fsdp", "tensor")

MeshAxes = str | tuple[str, ...] | None
Rules = Mapping[str, MeshAxes]
# One row a parameter family: a regular expression for the whole path, a name a dimension.
ParamAxes = Sequence[tuple[str, Sequence[str | None]]]
Tree = Any

DEFAULT_RULES: Rules = {
    # Activations. The batch is spread over data and fsdp, as in every ZeRO-3 scheme.
    "batch": ("data", "fsdp"),
    "seq": None,
    "act_embed": None,
    "act_mlp": "tensor",
    "act_heads": "tensor",
    "act_kv_heads": None,
    "act_vocab": "tensor",
    # Parameters.
    "layers": None,
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "vocab": "tensor",
    "position": None,
    "query": None,
    "norm": None,
    "bias": None,
    "channels_in": "fsdp",
    "channels_out": "tensor",
    "kernel_h": None,
    "kernel_w": None,
}

_rules: contextvars.ContextVar[Rules] = contextvars.ContextVar("rules", default=DEFAULT_RULES)


@contextlib.contextmanager
def use_rules(rules: Rules) -> Iterator[None]:
    """Sets the rules that `constrain` applies inside the block.

    They are read while a function is traced: enter the block around the first call (or the
    lowering) of a jitted function, and don't trace one function under two sets of rules.
    """
    token = _rules.set(rules)
    try:
        yield
    finally:
        _rules.reset(token)


def make_mesh(shape: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Builds a mesh with Auto axes.

    Args:
        shape: size of each axis; names from data, fsdp, tensor, at most one size -1 (the rest).
            `{}` is the same as `{"data": -1}`.
        devices: the devices to use, all of them by default. Where they come from several TPU
            slices, the first axis (data, as a rule) spans the slices, since the network between
            slices is slow.

    Raises:
        ConfigError: for an unknown axis, two sizes of -1, or sizes whose product is not the
            number of devices.
    """
    shape = dict(shape) or {"data": -1}
    devices = list(jax.devices() if devices is None else devices)
    if unknown := [name for name in shape if name not in MESH_AXES]:
        raise ConfigError(f"unknown mesh axes {unknown}; choose from {list(MESH_AXES)}")
    shape = _resolve_sizes(shape, len(devices))
    names = tuple(shape)
    types = (AxisType.Auto,) * len(names)
    # Only on TPUs does a slice index mean a slow boundary that a mesh must not cross at will.
    tpus = [device for device in devices if device.platform == "tpu"]
    num_slices = len({getattr(device, "slice_index", 0) for device in tpus})
    if num_slices < 2:
        return jax.make_mesh(tuple(shape.values()), names, axis_types=types, devices=devices)
    from jax.experimental import mesh_utils

    first, *rest = shape.values()
    if first % num_slices:
        raise ConfigError(
            f"the first mesh axis, {names[0]}={first}, must be a multiple of the {num_slices} "
            "TPU slices, because only it may cross between slices"
        )
    grid = mesh_utils.create_hybrid_device_mesh(
        (first // num_slices, *rest), (num_slices, *[1] * len(rest)), devices=devices
    )
    return Mesh(grid, names, axis_types=types)


def _resolve_sizes(shape: dict[str, int], num_devices: int) -> dict[str, int]:
    free = [name for name, size in shape.items() if size == -1]
    if len(free) > 1:
        raise ConfigError(f"mesh {shape}: only one size may be -1")
    if bad := {name: size for name, size in shape.items() if size < 1 and size != -1}:
        raise ConfigError(f"mesh sizes must be positive or -1, got {bad}")
    known = math.prod(size for size in shape.values() if size != -1)
    if free and num_devices % known == 0:
        shape = {name: num_devices // known if size == -1 else size for name, size in shape.items()}
    elif free or known != num_devices:
        raise ConfigError(
            f"mesh {shape} does not fit {num_devices} devices: the product of the sizes must "
            f"{'divide' if free else 'equal'} their number"
        )
    return shape


def param_shardings(abstract: Tree, param_axes: ParamAxes, rules: Rules, mesh: Mesh) -> Tree:
    """Shardings of a parameter tree, strictly from its table of logical axes.

    Args:
        abstract: tree of anything with a shape.
        param_axes: `((path regex, (logical axis or None a dimension, ...)), ...)`.
        rules: logical axis -> mesh axis, tuple of mesh axes, or None. A mesh axis that the mesh
            lacks counts as size 1.
        mesh: the mesh.

    Returns:
        A tree of `NamedSharding` like `abstract`.

    Raises:
        ValueError: listing at once every parameter that no row or several rows match, every row
            that matches nothing, every rank mismatch, logical axis without a rule, mesh axis
            used twice in one parameter, and dimension that its mesh axes don't divide.
    """
    table = [(re.compile(pattern), tuple(axes)) for pattern, axes in param_axes]
    used: set[int] = set()
    problems: list[str] = []

    def one(path: Sequence[Any], leaf: Any) -> NamedSharding:
        name = path_str(path)
        hits = [i for i, (pattern, _) in enumerate(table) if pattern.fullmatch(name)]
        used.update(hits)
        if len(hits) != 1:
            rows = ", ".join(repr(table[i][0].pattern) for i in hits)
            problems.append(f"{name}: {f'matched by {rows}' if hits else 'no row matches it'}")
            return NamedSharding(mesh, PartitionSpec())
        spec, faults = _spec_of(leaf.shape, table[hits[0]][1], rules, mesh)
        problems.extend(f"{name}: {fault}" for fault in faults)
        return NamedSharding(mesh, spec if not faults else PartitionSpec())

    out = jax.tree_util.tree_map_with_path(one, abstract)
    dead = [pattern.pattern for i, (pattern, _) in enumerate(table) if i not in used]
    problems.extend(f"row {pattern!r} matches no parameter" for pattern in dead)
    if problems:
        raise ValueError("parameters and sharding rules disagree:\n  " + "\n  ".join(problems))
    return out


def _spec_of(
    shape: Sequence[int], axes: Sequence[str | None], rules: Rules, mesh: Mesh
) -> tuple[PartitionSpec, list[str]]:
    """Returns the spec of one array and what is wrong with it."""
    if len(axes) != len(shape):
        return PartitionSpec(), [f"axes {tuple(axes)} for shape {tuple(shape)}"]
    faults, entries = [], []
    for axis, dim in zip(axes, shape, strict=True):
        if axis is not None and axis not in rules:
            faults.append(f"logical axis {axis!r} has no rule; add one (it may be None)")
            continue
        mesh_axes = _present(rules[axis] if axis else None, mesh)
        count = math.prod(mesh.shape[name] for name in mesh_axes)
        if dim % count:
            faults.append(f"{axis}={dim} is not divisible by {'*'.join(mesh_axes)}={count}")
        entries.append(_entry(mesh_axes))
    flat = [name for entry in entries for name in _names(entry)]
    if twice := sorted({name for name in flat if flat.count(name) > 1}):
        faults.append(f"axes {tuple(axes)} use mesh axis {', '.join(twice)} more than once")
    return PartitionSpec(*entries), faults


def _names(axes: MeshAxes) -> tuple[str, ...]:
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else tuple(axes)


def _present(axes: MeshAxes, mesh: Any) -> tuple[str, ...]:
    names = _names(axes)
    if unknown := [name for name in names if name not in MESH_AXES]:
        raise ValueError(f"rules name mesh axes {unknown}; there are only {list(MESH_AXES)}")
    return tuple(name for name in names if name in mesh.axis_names)


def _entry(names: tuple[str, ...]) -> MeshAxes:
    if len(names) < 2:
        return names[0] if names else None
    return names


def fsdp_by_size(abstract: Tree, mesh: Mesh, axis: str = "fsdp", min_size: int = 2**18) -> Tree:
    """Shardings for towers without a table: the largest divisible dimension over one axis.

    Arrays of fewer than `min_size` elements, or with no divisible dimension, are replicated: a
    gather costs more than their memory is worth (the scheme of openpi's `fsdp_sharding`).
    """
    size = mesh.shape.get(axis, 1)

    def one(leaf: Any) -> NamedSharding:
        dims = [i for i, dim in enumerate(leaf.shape) if dim % size == 0]
        if size == 1 or np.prod(leaf.shape, dtype=np.int64) < min_size or not dims:
            return NamedSharding(mesh, PartitionSpec())
        best = max(dims, key=lambda i: leaf.shape[i])
        return NamedSharding(mesh, PartitionSpec(*[None] * best, axis))

    return jax.tree.map(one, abstract)


def fsdp_axis(mesh: Mesh) -> str:
    """The axis over which parameters are split: "fsdp", or the first where there is none."""
    return "fsdp" if "fsdp" in mesh.shape else next(iter(mesh.shape))


def replicated(tree: Tree, mesh: Mesh) -> Tree:
    """A tree like `tree` that holds the same full copy on every device."""
    return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree)


def batch_sharding(mesh: Mesh, rules: Rules = DEFAULT_RULES) -> NamedSharding:
    """Sharding of any batch array: its first dimension over the rule for "batch"."""
    return NamedSharding(mesh, PartitionSpec(_entry(_present(rules["batch"], mesh))))


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Checks that a batch divides over a mesh, which is cheaper before anything is loaded.

    Raises:
        ConfigError: it does not, or devices of several processes would hold the same rows: each
            process loads rows of its own.
    """
    axes = _present(DEFAULT_RULES["batch"], mesh)
    parts = math.prod(mesh.shape[name] for name in axes)
    if batch_size % parts:
        raise ConfigError(
            f"data.batch_size {batch_size} does not divide over the {parts} parts of the mesh's "
            f"{' and '.join(axes)} ({dict(mesh.shape)}); make it a multiple of {parts}, or change "
            "run.mesh"
        )
    check_processes(mesh.devices, mesh.axis_names, axes)


def check_processes(devices: np.ndarray, names: Sequence[str], batch_axes: Sequence[str]) -> None:
    """Checks that the rows of a batch are split over processes, each row in one of them.

    Args:
        devices: of a mesh, `[size of each axis]`; each has a `process_index`.
        names: of the axes.
        batch_axes: those that the rows are split over.

    Raises:
        ConfigError: it is not so; naming processes that share rows.
    """
    first: dict[tuple[int, ...], int] = {}
    for place, device in np.ndenumerate(devices):
        row = tuple(i for i, name in zip(place, names, strict=True) if name in batch_axes)
        owner = first.setdefault(row, device.process_index)
        if owner != device.process_index:
            others = [name for name in names if name not in batch_axes]
            sizes = dict(zip(names, devices.shape, strict=True))
            raise ConfigError(
                f"mesh {sizes}: processes {owner} and {device.process_index} would hold the same "
                f"rows of a batch, but each process loads its own; keep {' and '.join(others)} "
                "within the devices of one process"
            )


def constrain(x: jax.Array, *logical_axes: str | None, rules: Rules | None = None) -> jax.Array:
    """Hints how an activation is laid out; without a mesh (`jax.set_mesh`) it does nothing.

    Dimensions that the mesh axes don't divide (a batch of one, say) stay unconstrained.

    Args:
        x: activation.
        *logical_axes: a name or None for each dimension.
        rules: logical axis -> mesh axes; by default those of `use_rules`, else `DEFAULT_RULES`.

    Raises:
        ValueError: on a wrong number of axes or a name without a rule, with or without a mesh.
    """
    rules = _rules.get() if rules is None else rules
    if len(logical_axes) != x.ndim:
        raise ValueError(f"constrain: axes {logical_axes} for shape {x.shape}")
    if unknown := [axis for axis in logical_axes if axis is not None and axis not in rules]:
        raise ValueError(f"constrain: logical axes {unknown} have no rule; add one (maybe None)")
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    entries = []
    for axis, dim in zip(logical_axes, x.shape, strict=True):
        names = _present(rules[axis] if axis else None, mesh)
        divides = dim % math.prod(mesh.shape[name] for name in names) == 0
        # UNCONSTRAINED leaves the choice to the compiler; None would force a gather.
        free = PartitionSpec.UNCONSTRAINED
        entries.append(_entry(names) if divides else free)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*entries))


def keep_rows(x: jax.Array) -> jax.Array:
    """Hints that each device computes its own rows `[B, ...]`, whole.

    Where weights are split over the axis of the batch (ZeRO-3, arXiv 1910.02054), the compiler may
    either gather the weights of a layer or split its features and exchange activations, which for
    images are a hundred times larger. Without hints it does the latter.
    """
    return constrain(x, "batch", *[None] * (x.ndim - 1))


def mesh_of(tree: Tree) -> contextlib.AbstractContextManager:
    """Sets the mesh that a tree's arrays lie on, unless one is set or they lie on none.

    A jitted program has to see the mesh to give a fused kernel a part of it: core_jax.ops.splash.
    """
    leaf = next(iter(jax.tree.leaves(tree)), None)
    sharding = getattr(leaf, "sharding", None)
    set_already = not jax.sharding.get_abstract_mesh().empty
    if set_already or not isinstance(sharding, jax.sharding.NamedSharding):
        return contextlib.nullcontext()
    return jax.set_mesh(sharding.mesh)  # type: ignore[arg-type]


def abstract_like(tree: Tree, shardings: Tree) -> Tree:
    """Shapes and dtypes of `tree` with shardings attached, as restoring and lowering need them.

    Args:
        tree: arrays or abstract arrays.
        shardings: a tree of shardings like `tree`, or one sharding for all leaves.
    """
    if isinstance(shardings, jax.sharding.Sharding):
        one = shardings
        shardings = jax.tree.map(lambda _: one, tree)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )
