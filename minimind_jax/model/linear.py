"""Matrix products with the kernels of linear layers, arranged as XLA multiplies fast on a CPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array

from minimind_jax.model.config import Platform

# Up to so many rows the product with a kernel stored as (out, in) has the kernel as its first operand.
FEW_ROWS = 64

# Up to so many float32 in a kernel XLA multiplies a single row on one core, but both halves of a batch at once.
ONE_CORE = 2**19


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TransposedKernel:
    """A kernel stored as (out, in), in place of the (in, out) array.

    For generation on a CPU, where XLA is slower with a few rows times (in, out): 16 rows, 12 times 512 to 1,408 and
    back, take 5.8 ms, and 4.7 with this.
    """

    kernel_OI: Array

    def __getitem__(self, _) -> "TransposedKernel":
        return self  # as nnx.Param reads its array


def multiply(
    x: Array,
    kernel: Array | TransposedKernel,
    platform: Platform,
    preferred_element_type: jnp.dtype | None = None,
    precision: jax.lax.Precision | None = None,
) -> Array:
    """x (..., in) times the kernel, in the dtype of x: (..., out). preferred_element_type: for a TransposedKernel.
    precision: of float32, for an array; None leaves it to the device (see `transformer.full_precision`)."""
    on_cpu = platform == "cpu"
    if not isinstance(kernel, TransposedKernel):
        kernel_IO = kernel.astype(x.dtype)
        return _product(x, kernel_IO, precision) if on_cpu else jnp.matmul(x, kernel_IO, precision=precision)
    kernel_OI = kernel.kernel_OI.astype(x.dtype)
    rows = x.size // x.shape[-1]
    if rows > FEW_ROWS or not on_cpu:
        return jnp.einsum("...I,OI->...O", x, kernel_OI, preferred_element_type=preferred_element_type)
    x_MI = x.reshape(rows, -1)
    if rows == 1 and kernel_OI.size <= ONE_CORE and len(kernel_OI) % 2 == 0 and x.dtype == jnp.float32:
        operands = kernel_OI.reshape(2, -1, x.shape[-1]), jnp.broadcast_to(x_MI, (2, *x_MI.shape))
        out_GOM = jnp.einsum("GOI,GMI->GOM", *operands, preferred_element_type=preferred_element_type)
        return jax.lax.optimization_barrier(out_GOM).reshape(*x.shape[:-1], -1)
    out_OM = jnp.einsum("OI,MI->OM", kernel_OI, x_MI, preferred_element_type=preferred_element_type)
    # The barrier keeps XLA from swapping the operands back, which makes it slow again.
    return jax.lax.optimization_barrier(out_OM).T.reshape(*x.shape[:-1], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x, kernel_IO, precision):
    return jnp.matmul(x, kernel_IO, precision=precision)


def _product_forward(x, kernel_IO, precision):
    return jnp.matmul(x, kernel_IO, precision=precision), (x, kernel_IO)


def _product_backward(precision, saved, grad):
    """The kernel's gradient contracts the rows of both operands, for which XLA on a CPU transposes the first.

    That is x, which is narrow and shared by the kernels that read it, but for down_proj, whose x is the wide one. JAX's
    own rule puts the gradient first: a step of the 29M model then takes about a tenth more time.
    """
    x, kernel_IO = saved
    rows = tuple(range(x.ndim - 1))
    numbers = ((rows, rows), ((), ()))
    if x.shape[-1] <= 2 * grad.shape[-1]:
        grad_IO = jax.lax.dot_general(x, grad, numbers, precision)
    else:  # the barrier keeps XLA from swapping the operands back
        grad_IO = jax.lax.optimization_barrier(jax.lax.dot_general(grad, x, numbers, precision)).T
    return jnp.matmul(grad, kernel_IO.T, precision=precision), grad_IO


_product.defvjp(_product_forward, _product_backward)
