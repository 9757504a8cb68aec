import contextlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from core_jax import sharding
from core_jax.config import ConfigError


@pytest.fixture
def mesh():
    return sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})


def abstract():
    return {
        "embed": jax.ShapeDtypeStruct((16, 8), jnp.float32),
        "layers": {"up": {"kernel": jax.ShapeDtypeStruct((3, 8, 12), jnp.float32)}},
    }


AXES = (("embed", ("vocab", "embed")), ("layers/up/kernel", ("layers", "embed", "mlp")))


def test_make_mesh_is_auto_and_fills_in_one_size():
    mesh = sharding.make_mesh({"data": -1, "tensor": 4})
    assert dict(mesh.shape) == {"data": 2, "tensor": 4}
    assert mesh.axis_types == (AxisType.Auto,) * 2
    assert dict(sharding.make_mesh({}).shape) == {"data": 8}
    assert dict(sharding.make_mesh({"fsdp": 1}, jax.devices()[:1]).shape) == {"fsdp": 1}


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"data": 3}, r"does not fit 8 devices"),
        ({"data": -1, "fsdp": 3}, r"does not fit 8 devices"),
        ({"data": -1, "fsdp": -1}, r"only one size may be -1"),
        ({"model": 8}, r"unknown mesh axes \['model'\]"),
        ({"data": 0}, r"positive or -1"),
    ],
)
def test_make_mesh_errors(shape, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(shape)


def test_a_batch_divides_over_data_and_fsdp(mesh):
    sharding.check_batch(8, mesh)
    with pytest.raises(ConfigError, match=r"batch_size 6 does not divide .* 4 parts .* data and"):
        sharding.check_batch(6, mesh)


@pytest.mark.parametrize(
    ("processes", "fits"),
    [([[0, 0], [1, 1]], True), ([[1, 1], [0, 0]], True), ([[0, 1], [0, 1]], False)],
)
def test_no_two_processes_hold_the_same_rows(processes, fits):
    """Each loads rows of its own: the rows of one of them would be left out in silence."""
    devices = np.array([[SimpleNamespace(process_index=i) for i in row] for row in processes])
    with (
        contextlib.nullcontext()
        if fits
        else pytest.raises(
            ConfigError, match=r"'tensor': 2.*processes 0 and 1 .* keep tensor within"
        )
    ):
        sharding.check_processes(devices, ("data", "tensor"), ("data", "fsdp"))


def test_param_shardings(mesh):
    out = sharding.param_shardings(abstract(), AXES, sharding.DEFAULT_RULES, mesh)
    assert out["embed"].spec == P("tensor", "fsdp")
    assert out["layers"]["up"]["kernel"].spec == P(None, "fsdp", "tensor")
    jax.tree.map(lambda a, s: s.shard_shape(a.shape), abstract(), out)


def test_param_shardings_drop_axes_that_the_mesh_lacks():
    mesh = sharding.make_mesh({"fsdp": 8})
    out = sharding.param_shardings(abstract(), AXES, sharding.DEFAULT_RULES, mesh)
    assert out["embed"].spec == P(None, "fsdp")


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (AXES[:1], r"layers/up/kernel: no row matches it"),
        ((*AXES, ("emb.*", (None, None))), r"embed: matched by 'embed', 'emb\.\*'"),
        ((*AXES, ("nope", ())), r"row 'nope' matches no parameter"),
        ((("embed", ("vocab",)), AXES[1]), r"embed: axes \('vocab',\) for shape \(16, 8\)"),
        ((("embed", ("embed", "embed")), AXES[1]), r"embed: .*fsdp more than once"),
        ((("embed", ("vocabb", None)), AXES[1]), r"embed: logical axis 'vocabb' has no rule"),
    ],
)
def test_param_shardings_are_strict(mesh, axes, message):
    with pytest.raises(ValueError, match=message):
        sharding.param_shardings(abstract(), axes, sharding.DEFAULT_RULES, mesh)


def test_param_shardings_refuse_indivisible_dimension():
    mesh = sharding.make_mesh({"tensor": 8})
    with pytest.raises(ValueError, match=r"mlp=12 is not divisible by tensor=8"):
        sharding.param_shardings(abstract(), AXES, sharding.DEFAULT_RULES, mesh)


def test_param_shardings_list_everything_at_once(mesh):
    bad = (("embed", ("vocab",)), ("dead", ()))
    with pytest.raises(ValueError, match=r"embed: axes") as info:
        sharding.param_shardings(abstract(), bad, sharding.DEFAULT_RULES, mesh)
    assert "layers/up/kernel" in str(info.value)
    assert "'dead'" in str(info.value)


def test_rules_with_an_unknown_mesh_axis_raise(mesh):
    with pytest.raises(ValueError, match=r"\['model'\]"):
        sharding.param_shardings(abstract(), AXES, {"vocab": "model", "embed": None}, mesh)


def test_fsdp_by_size(mesh):
    tree = {
        "big": jax.ShapeDtypeStruct((3, 3, 64, 128), jnp.float32),
        "odd": jax.ShapeDtypeStruct((101, 1001), jnp.float32),
        "small": jax.ShapeDtypeStruct((64,), jnp.float32),
    }
    out = sharding.fsdp_by_size(tree, mesh, min_size=1024)
    assert out["big"].spec == P(None, None, None, "fsdp")
    assert out["odd"].spec == P()
    assert out["small"].spec == P()
    assert sharding.fsdp_by_size(tree, mesh, "absent")["big"].spec == P()


def test_batch_sharding_and_replicated(mesh):
    assert sharding.batch_sharding(mesh, sharding.DEFAULT_RULES).spec == P(("data", "fsdp"))
    assert sharding.batch_sharding(sharding.make_mesh({"data": 8})).spec == P("data")
    out = sharding.replicated(abstract(), mesh)
    assert all(s.spec == P() for s in jax.tree.leaves(out))


def test_constrain_shards_and_needs_no_mesh(mesh):
    f = jax.jit(lambda x: sharding.constrain(x * 1, "batch", None, "act_mlp"))
    x = jnp.arange(4 * 3 * 2.0).reshape(4, 3, 2)
    np.testing.assert_array_equal(f(x), x)
    with jax.set_mesh(mesh):
        out = f(x)
    assert out.sharding.is_equivalent_to(
        NamedSharding(mesh, P(("data", "fsdp"), None, "tensor")), 3
    )
    np.testing.assert_array_equal(out, x)


def test_constrain_leaves_indivisible_dimensions_free(mesh):
    with jax.set_mesh(mesh):
        out = jax.jit(lambda x: sharding.constrain(x + 0, "batch", "act_mlp"))(jnp.ones((1, 4)))
    assert out.shape == (1, 4)


def test_constrain_errors_without_a_mesh():
    with pytest.raises(ValueError, match=r"for shape \(2, 2\)"):
        sharding.constrain(jnp.ones((2, 2)), "batch")
    with pytest.raises(ValueError, match=r"\['bach'\] have no rule"):
        sharding.constrain(jnp.ones((2,)), "bach")


def test_use_rules_changes_constrain(mesh):
    with jax.set_mesh(mesh), sharding.use_rules({"batch": "tensor"}):
        out = jax.jit(lambda x: sharding.constrain(x + 0, "batch"))(jnp.ones((4,)))
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, P("tensor")), 1)


def test_mesh_of_sets_the_mesh_of_arrays_unless_one_is_set(mesh):
    def seen():
        return dict(jax.sharding.get_abstract_mesh().shape)

    placed = {"x": jax.device_put(jnp.ones(8), NamedSharding(mesh, P()))}
    with sharding.mesh_of(placed):
        assert seen() == dict(mesh.shape)
    other = sharding.make_mesh({"data": 8})
    with jax.set_mesh(other), sharding.mesh_of(placed):
        assert seen() == {"data": 8}
    for tree in ({"x": jnp.ones(8)}, {"x": np.ones(8)}, {}):
        with sharding.mesh_of(tree):
            assert seen() == {}


def test_abstract_like(mesh):
    shardings = sharding.param_shardings(abstract(), AXES, sharding.DEFAULT_RULES, mesh)
    out = sharding.abstract_like(abstract(), shardings)
    assert out["embed"].sharding == shardings["embed"]
    assert out["embed"].shape == (16, 8)
    one = NamedSharding(mesh, P())
    assert sharding.abstract_like({"x": jnp.ones(3)}, one)["x"].sharding == one
