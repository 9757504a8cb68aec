import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_jax import partition


def tree():
    return {
        "a": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros((3,))},
        "b": {"c": {"kernel": jnp.ones((4,), jnp.bfloat16)}},
    }


def test_flatten_round_trips():
    flat = partition.flatten(tree())
    assert list(flat) == ["a/kernel", "a/bias", "b/c/kernel"]
    back = partition.unflatten(flat)
    assert jax.tree.structure(back) == jax.tree.structure(tree())


def test_flatten_agrees_with_path_str():
    names = {partition.path_str(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree())}
    assert names == set(partition.flatten(tree()))


def test_flatten_refuses_slash_in_key():
    with pytest.raises(ValueError, match="a/b"):
        partition.flatten({"a/b": 1})


def test_unflatten_refuses_leaf_that_is_a_parent():
    with pytest.raises(ValueError, match="both a leaf and a parent: a"):
        partition.unflatten({"a": 1, "a/b": 2})


def test_split_and_merge():
    params = tree()
    trainable, frozen = partition.split(params, ["a/.*"])
    assert set(partition.flatten(trainable)) == {"a/kernel", "a/bias"}
    assert set(partition.flatten(frozen)) == {"b/c/kernel"}
    merged = partition.merge(trainable, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert merged["a"]["bias"] is params["a"]["bias"]


def test_split_matches_whole_paths_only():
    with pytest.raises(ValueError, match=r"'kernel'.*'zzz'"):
        partition.split(tree(), ["a/.*", "kernel", "zzz"])


def test_split_of_everything_leaves_an_empty_dict():
    trainable, frozen = partition.split(tree(), [".*"])
    assert frozen == {}
    assert partition.count_parameters(trainable) == 13


def test_merge_refuses_overlap():
    with pytest.raises(ValueError, match="both trainable and frozen: a/bias"):
        partition.merge({"a": {"bias": 1}}, {"a": {"bias": 2, "kernel": 3}})


def test_count_parameters_of_abstract_tree():
    abstract = jax.eval_shape(tree)
    assert partition.count_parameters(abstract) == 6 + 3 + 4


def test_tree_hash_sees_name_dtype_shape_and_value():
    base = {"a": np.zeros((2, 2), np.float32)}
    variants = [
        base,
        {"b": np.zeros((2, 2), np.float32)},
        {"a": np.zeros((2, 2), np.int32)},
        {"a": np.zeros((4,), np.float32)},
        {"a": np.array([[0, 0], [0, 1e-45]], np.float32)},
    ]
    assert len({partition.tree_hash(v) for v in variants}) == len(variants)


def test_tree_hash_ignores_order_and_placement():
    one = {"a": np.arange(3.0), "b": {"c": np.arange(8)}}
    two = {"b": {"c": np.arange(8)}, "a": np.arange(3.0)}
    assert partition.tree_hash(one) == partition.tree_hash(two)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = np.arange(8, dtype=np.int32)
    assert partition.tree_hash({"x": x}) == partition.tree_hash({"x": jax.device_put(x, spec)})


def test_tree_hash_refuses_abstract_leaf():
    with pytest.raises(TypeError, match="a is abstract"):
        partition.tree_hash({"a": jax.ShapeDtypeStruct((2,), jnp.float32)})
