"""A tiny regression that every training test shares: frozen features, a trainable MLP."""

import jax
import jax.numpy as jnp
import numpy as np

from core_jax.train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from core_jax.train.state import init_state
from core_jax.train.step import make_train_step

WIDTH, HIDDEN, BATCH = 8, 16, 16
PARAM_AXES = (
    ("up/kernel", ("embed", "mlp")),
    ("up/bias", ("mlp",)),
    ("down/kernel", ("mlp", "embed")),
)
CONFIG = OptimizerConfig(learning_rate=1e-2, total_steps=20, warmup_steps=2, weight_decay=0.1)


def params():
    rng = np.random.default_rng(0)
    return {
        "up": {
            "kernel": jnp.asarray(0.3 * rng.normal(size=(WIDTH, HIDDEN)), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=(HIDDEN,)), jnp.float32),
        },
        "down": {"kernel": jnp.asarray(0.3 * rng.normal(size=(HIDDEN, WIDTH)), jnp.float32)},
    }


def frozen():
    rng = np.random.default_rng(1)
    return {"tower": {"kernel": jnp.asarray(rng.normal(size=(WIDTH, WIDTH)), jnp.float32)}}


def batch(step):
    rng = np.random.default_rng([2, step])
    x = rng.normal(size=(BATCH, WIDTH)).astype(np.float32)
    mask = (rng.random(BATCH) < 0.6).astype(np.float32)
    return {"x": x, "y": np.roll(x, 1, axis=1), "mask": mask}


def batches(start):
    step = start
    while True:
        yield batch(step) | {"ids": np.array([f"s{step}-{i}" for i in range(BATCH)])}
        step += 1


def forward(params, frozen, x):
    h = jnp.tanh(x @ frozen["tower"]["kernel"])
    h = jax.nn.gelu(h @ params["up"]["kernel"] + params["up"]["bias"][None])
    return h @ params["down"]["kernel"]


def loss_fn(params, frozen, batch, key):
    """A masked mean, so that micro-batches have different weights; the key adds noise."""
    del key
    error = jnp.square(forward(params, frozen, batch["x"]) - batch["y"]).mean(-1)
    weight = batch["mask"].sum()
    loss = (error * batch["mask"]).sum() / jnp.maximum(weight, 1)
    return loss, {"weight": weight, "error": loss}


def noisy_loss_fn(params, frozen, batch, key):
    noise = jax.random.normal(key, batch["y"].shape)
    return loss_fn(params, frozen, batch | {"y": batch["y"] + 0.1 * noise}, key)


def setup(loss=noisy_loss_fn, config=CONFIG, ema_decay=None, **kwargs):
    """Returns `(step, state, optimizer)`, nothing of it jitted."""
    schedule = make_schedule(config)
    optimizer = make_optimizer(config, schedule)
    step = make_train_step(loss, optimizer, schedule, ema_decay=ema_decay, seed=7, **kwargs)
    return step, init_state(params(), optimizer, ema_decay is not None), optimizer


def assert_equal(a, b):
    """Bitwise equality of two trees."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def max_difference(a, b):
    diffs = jax.tree.map(lambda x, y: np.abs(np.asarray(x) - np.asarray(y)).max(), a, b)
    return max(jax.tree.leaves(diffs))
