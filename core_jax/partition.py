"""Parameters as nested dicts, addressed by paths: split, merge, count, hash.

A parameter tree is a nested dict of arrays. A path is its keys joined by a slash,
`layers/attn/q/kernel`; patterns are regular expressions that must match a whole path.
Splitting happens once, before the optimizer is built, so that frozen weights have neither
gradients nor moments.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from core_jax.config import ConfigError

Tree = Any


def path_str(path: Sequence[Any]) -> str:
    """Joins a `jax.tree_util` key path into `a/b/c`."""

    def one(entry: Any) -> str:
        for attribute in ("key", "name", "idx"):
            if hasattr(entry, attribute):
                return str(getattr(entry, attribute))
        return str(entry)

    return "/".join(one(entry) for entry in path)


def flatten(tree: Mapping[str, Any], *, prefix: str = "") -> dict[str, Any]:
    """Returns `{path: leaf}` of a nested dict, in the dict's own order.

    Empty sub-dicts vanish, as they do in every pytree.

    Raises:
        ValueError: if a key is not a string or has a slash in it, since such a path could
            not be taken apart again.
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if not isinstance(key, str) or not key or "/" in key:
            raise ValueError(
                f"parameter key {key!r} under {prefix or 'the root'!r}: keys must be non-empty "
                "strings without a slash"
            )
        path = f"{prefix}/{key}" if prefix else key
        if isinstance(value, Mapping):
            flat.update(flatten(value, prefix=path))
        else:
            flat[path] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested dict of `{path: leaf}`; the inverse of `flatten`.

    Raises:
        ValueError: if one path is a leaf and also the parent of another.
    """
    tree: dict[str, Any] = {}
    parents = {path[:i] for path in flat for i, char in enumerate(path) if char == "/"}
    if clash := sorted(parents & flat.keys()):
        raise ValueError(f"paths are both a leaf and a parent: {', '.join(clash)}")
    for path, value in flat.items():
        *parts, last = path.split("/")
        node = tree
        for part in parts:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def split(params: Mapping[str, Any], patterns: Sequence[str]) -> tuple[dict, dict]:
    """Splits parameters into those that match any pattern and the rest.

    Args:
        params: nested dict; leaves may be arrays or abstract.
        patterns: regular expressions, each matched against whole paths.

    Returns:
        `(trainable, frozen)`, nested dicts that `merge` puts together again.

    Raises:
        ConfigError: if a pattern matches nothing, naming every such pattern, or is none.
    """
    flat = flatten(params)
    try:
        compiled = [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise ConfigError(f"{error.pattern!r} is no regular expression: {error}") from error
    dead = [p.pattern for p in compiled if not any(p.fullmatch(path) for path in flat)]
    if dead:
        known = sorted({path.split("/")[0] for path in flat})
        raise ConfigError(
            f"patterns match no parameter: {', '.join(map(repr, dead))}. They must match whole "
            f"paths such as {next(iter(flat), 'a/b')!r}; the top-level names are {known}"
        )
    chosen = {path for path in flat if any(p.fullmatch(path) for p in compiled)}
    trainable = unflatten({path: leaf for path, leaf in flat.items() if path in chosen})
    frozen = unflatten({path: leaf for path, leaf in flat.items() if path not in chosen})
    return trainable, frozen


def merge(trainable: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """Returns one nested dict with the leaves of both.

    Raises:
        ValueError: if a path is in both, naming every such path.
    """
    one, two = flatten(trainable), flatten(frozen)
    if both := sorted(one.keys() & two.keys()):
        raise ValueError(f"parameters are both trainable and frozen: {', '.join(both)}")
    return unflatten({**one, **two})


def count_parameters(tree: Tree) -> int:
    """Number of scalars in all leaves; abstract leaves count too."""
    return sum(int(np.prod(leaf.shape, dtype=np.int64)) for leaf in jax.tree.leaves(tree))


def tree_hash(tree: Tree) -> str:
    """SHA-256 over the sorted paths, dtypes, shapes and bytes of all leaves, in hex.

    It names frozen weights in checkpoint metadata. Every process must call it when leaves span
    processes, as their parts are gathered one leaf at a time.
    """
    digest = hashlib.sha256()
    leaves = {path_str(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    for path in sorted(leaves):
        array = _to_host(path, leaves[path])
        digest.update(f"{path}\0{array.dtype}\0{array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _to_host(path: str, leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise TypeError(f"{path} is abstract: it has no bytes to hash")
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        from jax.experimental import multihost_utils

        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


def cast_floating(tree: Any, dtype: Any) -> Any:
    """Floating-point leaves in a type. One program casts all: one a shape takes seconds."""
    leaves, structure = jax.tree.flatten(tree)
    other = [
        i
        for i, x in enumerate(leaves)
        if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype != jnp.dtype(dtype)
    ]
    if other:
        done = jax.jit(lambda xs: [x.astype(dtype) for x in xs])([leaves[i] for i in other])
        for i, x in zip(other, done, strict=True):
            leaves[i] = x
    return jax.tree.unflatten(structure, leaves)
