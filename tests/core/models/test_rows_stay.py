"""With weights split over the batch's axis, weights travel and activations do not (ZeRO-3)."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from core_jax.models import clip_text, florence2
from core_jax.sharding import DEFAULT_RULES, abstract_like, fsdp_by_size, make_mesh, use_rules
from launch.collectives import find_collectives
from launch.hlo import parse

B = 16  # rows, two a device


def _florence2():
    model = florence2.Florence2(config=florence2.Florence2Config.tiny())

    def run(params, images):
        tokens = model.apply({"params": params}, images, method="encode_image")
        return model.apply({"params": params}, tokens, method="encode")

    return florence2.FAMILY.abstract_params(model), run, (B, 64, 64, 3)


def _clip_text():
    config = clip_text.CLIPTextConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=40,
    )  # fmt: skip
    model = clip_text.CLIPTextModel(config=config)

    def run(params, embeds):
        return model.apply({"params": params}, embeds, method="from_embeddings")

    return clip_text.FAMILY.abstract_params(model), run, (B, 40, 64)


def _received(params, run, shape, rules):
    """Bytes that a device receives in a forward pass."""
    mesh = make_mesh({"fsdp": 8})
    shardings = fsdp_by_size(params, mesh, min_size=512)
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))

    def on_mesh(params, x):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), use_rules(rules):
            return run(params, x)

    step = jax.jit(on_mesh, out_shardings=rows)
    images = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows)
    compiled = step.lower(abstract_like(params, shardings), images).compile()
    return sum(c.wire_bytes for c in find_collectives(parse(compiled.as_text()), mesh.shape))


@pytest.mark.parametrize("network", [_florence2, _clip_text])
def test_what_a_device_receives_is_the_weights(network):
    params, run, shape = network()
    weights = sum(4 * x.size for x in jax.tree.leaves(params))
    received = _received(params, run, shape, DEFAULT_RULES)
    assert 0 < received < weights
    # The control: rows that are not held where they are travel as well.
    assert _received(params, run, shape, {**DEFAULT_RULES, "batch": None}) > 2 * received
