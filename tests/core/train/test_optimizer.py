import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_jax.sharding import DEFAULT_RULES, make_mesh, param_shardings
from core_jax.train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from core_jax.train.state import create_state
from tests.core.train import tiny_problem as tiny


def test_cosine_schedule_with_warmup():
    schedule = make_schedule(
        OptimizerConfig(learning_rate=2.0, warmup_steps=4, total_steps=12, min_ratio=0.1)
    )
    values = [float(schedule(i)) for i in range(30)]
    np.testing.assert_allclose(values[:4], [0.5, 1.0, 1.5, 2.0])
    assert values[4] == pytest.approx(2.0)
    assert values[8] == pytest.approx(2 * (0.1 + 0.9 * 0.5))
    assert values[12] == pytest.approx(0.2)
    # It stays at the minimum: the released code's rate rises again.
    assert values[29] == pytest.approx(0.2)
    assert values[4:13] == sorted(values[4:13], reverse=True)


def test_linear_and_constant_schedules():
    linear = make_schedule(OptimizerConfig(learning_rate=1.0, schedule="linear", total_steps=10))
    assert [float(linear(i)) for i in (0, 5, 10, 20)] == pytest.approx([1.0, 0.5, 0.0, 0.0])
    constant = make_schedule(OptimizerConfig(learning_rate=1.0, schedule="constant"))
    assert [float(constant(i)) for i in (0, 999, 5000)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "adam"}, "'adam'"),
        ({"schedule": "step"}, "'step'"),
        ({"warmup_steps": 1000}, "leaves nothing"),
        ({"min_ratio": 2.0}, "min_ratio"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"total_steps": 0}, "total_steps"),
        ({"learning_rate": 0.0}, "learning_rate"),
    ],
)
def test_bad_configs_raise(change, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**change)


def updates(config, grads, steps=1):
    params = tiny.params()
    optimizer = make_optimizer(config)
    state = optimizer.init(params)
    for _ in range(steps):
        out, state = optimizer.update(grads, state, params)
    return out


def test_adamw_equals_torch():
    torch = pytest.importorskip("torch")
    config = OptimizerConfig(
        learning_rate=0.1, schedule="constant", b1=0.9, b2=0.99, weight_decay=0.01, clip_norm=1.0
    )
    rng = np.random.default_rng(0)
    start = rng.normal(size=(3, 4)).astype(np.float32)
    grads = rng.normal(size=(5, 3, 4)).astype(np.float32)

    weight = torch.nn.Parameter(torch.tensor(start))
    oracle = torch.optim.AdamW([weight], lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01)
    for grad in grads:
        weight.grad = torch.tensor(grad)
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        oracle.step()

    def train(config):
        optimizer = make_optimizer(config)
        params = {"w": jnp.asarray(start)}
        state = optimizer.init(params)
        for grad in grads:
            update, state = optimizer.update({"w": jnp.asarray(grad)}, state, params)
            params = jax.tree.map(jnp.add, params, update)
        return np.asarray(params["w"])

    want = weight.detach().numpy()
    # torch clips with norm + 1e-6, hence not closer.
    np.testing.assert_allclose(train(config), want, atol=2e-6)
    control = train(OptimizerConfig(**{**vars(config), "b2": 0.999}))
    assert np.abs(control - want).max() > 2e-4


def test_weight_decay_reaches_all_or_the_named():
    grads = jax.tree.map(jnp.zeros_like, tiny.params())
    common = {"learning_rate": 1.0, "schedule": "constant", "weight_decay": 0.5}
    everything = updates(OptimizerConfig(**common), grads)
    np.testing.assert_allclose(everything["up"]["bias"], -0.5 * tiny.params()["up"]["bias"])
    some = updates(OptimizerConfig(**common, weight_decay_mask=(".*/kernel",)), grads)
    assert not np.asarray(some["up"]["bias"]).any()
    assert np.asarray(some["up"]["kernel"]).any()
    with pytest.raises(ValueError, match=r"\['nothing'\]"):
        updates(OptimizerConfig(**common, weight_decay_mask=("nothing",)), grads)


def test_clipping():
    grads = jax.tree.map(jnp.ones_like, tiny.params())
    config = OptimizerConfig(
        name="sgd", b1=0.0, learning_rate=1.0, schedule="constant", clip_norm=0.5
    )
    out = updates(config, grads)
    norm = np.sqrt(sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(out)))
    assert norm == pytest.approx(0.5, rel=1e-5)


def test_lr_multipliers():
    grads = jax.tree.map(jnp.ones_like, tiny.params())
    common = {"learning_rate": 1.0, "schedule": "constant"}
    plain = updates(OptimizerConfig(**common), grads)
    scaled = updates(OptimizerConfig(**common, lr_multipliers=((r"down/.*", 0.1),)), grads)
    np.testing.assert_allclose(scaled["down"]["kernel"], 0.1 * plain["down"]["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(scaled["up"]["kernel"], plain["up"]["kernel"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((("up/.*", 1.0), (".*/bias", 2.0)), "up/bias is matched by several"),
        ((("side/.*", 1.0),), r"match no trainable parameter: \['side/\.\*'\]"),
    ],
)
def test_lr_multipliers_are_strict(rows, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(OptimizerConfig(lr_multipliers=rows)).init(tiny.params())


def test_patterns_work_on_a_mesh():
    """Placing the state asks the optimizer for a state of placeholders, which have no paths."""
    mesh = make_mesh({"data": 8})
    shardings = param_shardings(tiny.params(), tiny.PARAM_AXES, DEFAULT_RULES, mesh)

    def build(pattern):
        optimizer = make_optimizer(
            OptimizerConfig(lr_multipliers=((pattern, 0.1),), weight_decay_mask=(pattern,))
        )
        return create_state(tiny.params(), optimizer, param_shardings=shardings, mesh=mesh)

    state, _ = build("down/.*")
    assert jax.tree.structure(state.params) == jax.tree.structure(tiny.params())
    with pytest.raises(ValueError, match="match no trainable parameter"):
        build("side/.*")


def test_muon_orthogonalises_kernels_and_leaves_the_rest_to_adam():
    rng = np.random.default_rng(0)
    shapes = {"layers": {"kernel": (3, 8, 16), "bias": (3, 16)}, "table": {"embedding": (5, 8)}}
    grads = jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32), shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )  # fmt: skip
    common = {"learning_rate": 1.0, "schedule": "constant", "clip_norm": None}

    def first_update(name):
        optimizer = make_optimizer(OptimizerConfig(name=name, **common))
        return optimizer.update(grads, optimizer.init(grads), grads)[0]

    muon, adam = first_update("muon"), first_update("adamw")
    for layer, gradient in zip(muon["layers"]["kernel"], grads["layers"]["kernel"], strict=True):
        # The same singular vectors, downhill, and nearly equal singular values: 0.2 * sqrt(16)
        # each, so that the root mean square is about what AdamW's is.
        u, _, vt = np.linalg.svd(np.asarray(gradient), full_matrices=False)
        values = -np.diag(u.T @ np.asarray(layer) @ vt.T)
        assert (np.abs(values / 0.8 - 1) < 0.4).all()
        spread = np.linalg.svd(np.asarray(gradient), compute_uv=False)
        assert spread.max() / spread.min() > 2  # control: the gradient's own are far from equal
    np.testing.assert_allclose(muon["layers"]["bias"], adam["layers"]["bias"], rtol=0.1)
    np.testing.assert_allclose(muon["table"]["embedding"], adam["table"]["embedding"], rtol=0.1)
    assert np.abs(muon["layers"]["kernel"] / adam["layers"]["kernel"] - 1).max() > 0.5


def test_muon_takes_a_convolution_as_the_matrix_that_it_is():
    """Of height * width * in rows; one whose channels are apart is none."""
    rng = np.random.default_rng(0)
    shapes = {"conv": (3, 3, 4, 8), "linear": (36, 8), "depthwise": (3, 3, 1, 8)}
    grads = {
        name: {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32)}
        for name, shape in shapes.items()
    }
    grads["linear"]["kernel"] = grads["conv"]["kernel"].reshape(36, 8)

    def first_update(name):
        config = OptimizerConfig(name=name, learning_rate=1.0, schedule="constant", clip_norm=None)
        optimizer = make_optimizer(config)
        return optimizer.update(grads, optimizer.init(grads), grads)[0]

    muon, adam = first_update("muon"), first_update("adamw")
    conv, linear = muon["conv"]["kernel"], muon["linear"]["kernel"]
    np.testing.assert_allclose(conv.reshape(36, 8), linear, rtol=1e-4, atol=1e-6)
    assert np.abs(conv / adam["conv"]["kernel"] - 1).max() > 0.5
    np.testing.assert_allclose(muon["depthwise"]["kernel"], adam["depthwise"]["kernel"], rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_lie_where_their_parameters_lie(name):
    mesh = make_mesh({"data": 2, "fsdp": 4})
    shardings = param_shardings(tiny.params(), tiny.PARAM_AXES, DEFAULT_RULES, mesh)
    optimizer = make_optimizer(OptimizerConfig(name=name, weight_decay=0.1))
    state, placed = create_state(tiny.params(), optimizer, param_shardings=shardings, mesh=mesh)
    wanted = {
        np.shape(x): s
        for x, s in zip(jax.tree.leaves(state.params), jax.tree.leaves(shardings), strict=True)
    }
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape in wanted]
    assert len(moments) == {"adamw": 6, "muon": 4}[name]  # Muon has no second moment of kernels
    for x in moments:
        assert x.sharding.is_equivalent_to(wanted[x.shape], x.ndim)
    assert not placed.params["up"]["kernel"].is_fully_replicated
