"""Products with kernels stored as (out, in)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minimind_jax.model.linear import FEW_ROWS, TransposedKernel, multiply


@pytest.mark.parametrize(("rows", "outer"), [(1, 40), (1, 41), (5, 40), (FEW_ROWS, 40), (FEW_ROWS + 1, 40)])
def test_transposed_kernel_gives_the_product_of_the_plain_one(rows, outer):
    x = jax.random.normal(jax.random.key(0), (rows, 1, 24))
    kernel_IO = jax.random.normal(jax.random.key(1), (24, outer))
    expected = np.asarray(x, np.float64) @ np.asarray(kernel_IO, np.float64)
    for kernel in (kernel_IO, TransposedKernel(kernel_IO.T)):
        out = jax.jit(multiply, static_argnums=2)(x, kernel, "cpu")
        assert out.shape == (rows, 1, outer)
        np.testing.assert_allclose(out, expected, atol=1e-5)


def test_product_is_in_the_dtype_of_the_rows_unless_asked_otherwise():
    x, kernel = jnp.ones((2, 4), jnp.bfloat16), TransposedKernel(jnp.ones((3, 4)))
    assert multiply(x, kernel, "cpu").dtype == jnp.bfloat16
    assert multiply(x, kernel, "cpu", jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize(("inner", "outer"), [(8, 24), (24, 24), (24, 8)])
def test_gradients_of_the_plain_product(inner, outer):
    x = jax.random.normal(jax.random.key(0), (3, 5, inner))
    kernel_IO = jax.random.normal(jax.random.key(1), (inner, outer))
    weights = jax.random.normal(jax.random.key(2), (3, 5, outer))
    found = jax.jit(jax.grad(lambda x, k: jnp.sum(multiply(x, k, "cpu") * weights), (0, 1)))(x, kernel_IO)
    expected = np.einsum("bto,io->bti", weights, kernel_IO), np.einsum("bti,bto->io", x, weights)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
