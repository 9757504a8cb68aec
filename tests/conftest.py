"""Strict settings for every test; they must be set before jax is imported."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A cheap compile is what a parity test needs; one program runs once.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
# torch spins while it waits for threads and starves the other worker otherwise.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
jax.config.update("jax_default_matmul_precision", "highest")

# Type and shape checks at function boundaries; in production they cost nothing.
try:
    from jaxtyping import install_import_hook

    install_import_hook(["core_jax.ops", "core_jax.nn", "core_jax.models"], "beartype.beartype")
except ImportError:  # the run-time environment has no beartype
    pass


@pytest.fixture
def rng():
    """A seeded numpy generator."""
    import numpy as np

    return np.random.default_rng(0)
