import jax
import jax.numpy as jnp
import numpy as np

from core_jax.ops.matmul import matmul
from tests.oracle import close


def test_equals_the_plain_product_in_value_and_gradients():
    rng = np.random.default_rng(0)
    x, kernel, weights = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((2, 3, 5, 4), (4, 6), (2, 3, 5, 6))
    )

    def value_and_grads(product):
        return jax.value_and_grad(lambda x, k: jnp.sum(product(x, k) * weights), (0, 1))(x, kernel)

    got, want = value_and_grads(matmul), value_and_grads(lambda x, k: x @ k)
    assert matmul(x, kernel).shape == (2, 3, 5, 6)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert close(np.asarray(a), np.asarray(b), 1e-5)


def test_the_gradient_multiplies_matrices():
    # Contractions over two axes are what makes XLA's CPU compiler copy the activations.
    x, kernel = jnp.ones((2, 3, 4)), jnp.ones((4, 5))
    grad = jax.make_jaxpr(jax.grad(lambda k: jnp.sum(jnp.square(matmul(x, k)))))(kernel)
    plain = jax.make_jaxpr(jax.grad(lambda k: jnp.sum(jnp.square(x @ k))))(kernel)

    def most_contracted(jaxpr):
        dots = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
        return max(len(e.params["dimension_numbers"][0][0]) for e in dots)

    assert most_contracted(grad.jaxpr) == 1
    assert most_contracted(plain.jaxpr) == 2
