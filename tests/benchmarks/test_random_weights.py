"""Random parameters."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.random_weights import random_leaves, random_params
from core_jax.partition import flatten
from core_jax.sharding import fsdp_by_size, make_mesh


def test_leaves_follow_their_names_and_paths():
    shapes = {
        "a": {"kernel": (400, 300), "scale": (300,), "bias": (300,)},
        "b": {"kernel": (400, 300)},
        "c": {"kernel": (3, 3, 50, 60)},
        "d": {"kernel": (5, 200, 100)},
    }
    abstract = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )  # fmt: skip
    flat = flatten(random_leaves(abstract))
    inputs = {"a/kernel": 400, "c/kernel": 450, "d/kernel": 200}
    for path, count in inputs.items():
        np.testing.assert_allclose(np.std(flat[path]), count**-0.5, rtol=0.05)
    np.testing.assert_allclose(np.mean(flat["a/scale"]), 1.0, atol=0.02)
    assert not np.array_equal(flat["a/kernel"], flat["b/kernel"])
    again = flatten(random_leaves(abstract))
    assert all(np.array_equal(flat[p], again[p]) for p in flat)
    other = flatten(random_leaves(abstract, seed=1))
    assert not np.array_equal(flat["a/kernel"], other["a/kernel"])


def test_leaves_are_made_where_they_live():
    mesh = make_mesh({"data": 1, "fsdp": -1})
    abstract = {"kernel": jax.ShapeDtypeStruct((1024, 512), jnp.float32)}
    places = fsdp_by_size(abstract, mesh)
    made = random_leaves(abstract, dtype=jnp.bfloat16, shardings=places)["kernel"]
    assert made.dtype == jnp.bfloat16
    assert made.sharding == places["kernel"]
    assert not made.sharding.is_fully_replicated
    np.testing.assert_allclose(np.std(np.asarray(made, np.float32)), 1024**-0.5, rtol=0.02)


def test_a_model_gives_finite_outputs():
    from benchmarks.generation import qwen2_config
    from core_jax.models.qwen2 import Qwen2ForCausalLM

    model = Qwen2ForCausalLM(config=qwen2_config("tiny"))
    logits = model.apply({"params": random_params(model)}, jnp.zeros((1, 4), jnp.int32))
    assert jnp.isfinite(logits).all()
    assert float(jnp.std(logits)) > 0.01
