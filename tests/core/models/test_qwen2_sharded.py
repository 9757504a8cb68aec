"""Qwen2 on a (data, tensor) mesh of 8 devices gives what it gives on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_jax.decode import generate
from core_jax.decode.adapters import CausalDecoder, TokenPrefix
from core_jax.models.qwen2 import FAMILY, Qwen2Config, Qwen2ForCausalLM
from core_jax.sharding import DEFAULT_RULES, batch_sharding, make_mesh, param_shardings
from tests.oracle import close, relative_error


@pytest.mark.parametrize("tied", [False, True])
def test_sharded_forward_and_greedy_equal_unsharded(tied):
    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    rng = np.random.default_rng(0)
    # Strong layers and a weak table: a tied model otherwise repeats its input.
    params = jax.tree.map(
        lambda x: jnp.float32(rng.normal(0, 0.1 if x.shape[0] == 64 else 0.5, x.shape)),
        FAMILY.abstract_params(model),
    )
    ids = jnp.asarray(rng.integers(0, 64, (4, 7)), jnp.int32)
    want = jax.jit(model.apply)({"params": params}, ids)
    decoder = CausalDecoder(model)
    tokens = generate(decoder, params, TokenPrefix(ids), max_new_tokens=16).tokens
    assert len(np.unique(tokens)) >= 10

    mesh = make_mesh({"data": 2, "tensor": 4})
    shardings = param_shardings(params, FAMILY.param_axes, DEFAULT_RULES, mesh)
    spread = jax.device_put(params, shardings)
    kernel = spread["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 32, 12)
    ids = jax.device_put(ids, batch_sharding(mesh))
    with jax.set_mesh(mesh):
        got = jax.jit(model.apply)({"params": spread}, ids)
        again = generate(decoder, spread, TokenPrefix(ids), max_new_tokens=16).tokens
    assert len(got.sharding.device_set) == 8
    assert close(got, want, 1e-5)
    np.testing.assert_array_equal(again, tokens)
    spread["norm"]["scale"] = spread["norm"]["scale"] * jnp.linspace(1, 1.1, 32)
    with jax.set_mesh(mesh):
        assert relative_error(jax.jit(model.apply)({"params": spread}, ids), want) > 1e-3
