"""Rotary tables with one, two and three positions."""

import jax.numpy as jnp
import numpy as np
import pytest

from core_jax.ops.rope import apply_rope, axial_rope_angles, mrope_angles, rope_angles


def test_three_equal_positions_are_one_to_the_bit():
    positions = jnp.asarray(np.random.default_rng(0).integers(0, 100_000, (2, 50)), jnp.int32)
    want = rope_angles(positions, head_dim=128, theta=1e6)
    three = jnp.broadcast_to(positions[None], (3, 2, 50))
    got = mrope_angles(three, head_dim=128, theta=1e6, sections=(16, 24, 24))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)
    moved = mrope_angles(three.at[2].add(1), head_dim=128, theta=1e6, sections=(16, 24, 24))
    same = np.asarray(moved[0] == want[0]).reshape(2, 50, 2, 64)
    assert same[..., :40].all()  # time and row
    assert not same[..., 40:50].all()  # column


def test_each_section_turns_by_its_own_position():
    positions = jnp.array([[[3]], [[5]], [[7]]])
    cos, sin = mrope_angles(positions, head_dim=16, theta=1e4, sections=(2, 3, 3))
    inv = 1e4 ** (-np.arange(8) / 8)
    angles = np.tile(np.array([3] * 2 + [5] * 3 + [7] * 3) * inv, 2)
    np.testing.assert_allclose(cos[0, 0], np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(sin[0, 0], np.sin(angles), atol=1e-6)
    with pytest.raises(ValueError, match="sum to head_dim"):
        mrope_angles(positions, head_dim=16, theta=1e4, sections=(2, 2, 2))


def test_axial_tables_give_both_axes_the_same_frequencies():
    cos, _ = axial_rope_angles(jnp.array([[[2, 9]]]), head_dim=16, theta=1e4)
    inv = 1e4 ** (-np.arange(4) / 4)
    angles = np.tile(np.concatenate([2 * inv, 9 * inv]), 2)
    np.testing.assert_allclose(cos[0, 0], np.cos(angles), atol=1e-6)


def test_products_depend_on_differences_of_places_only():
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))

    def product(a, b):
        turned = [
            apply_rope(x, *axial_rope_angles(jnp.array([[p]]), head_dim=16, theta=1e4))
            for x, p in ((q, a), (k, b))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    assert product([1, 2], [4, 7]) == pytest.approx(product([5, 0], [8, 5]), abs=1e-5)
    assert product([1, 2], [4, 7]) != pytest.approx(product([1, 2], [5, 6]), abs=1e-3)
