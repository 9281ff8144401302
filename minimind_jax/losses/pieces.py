"""What needs the logits of all words, made for a few tokens of every row at a time."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from minimind_jax.model.config import Platform
from minimind_jax.model.linear import TransposedKernel, multiply
from minimind_jax.sharding import MESH_AXES, ROW_AXES, current_mesh, row_shards

PIECE_BYTES = 2**28  # logits that a device makes at once: enough for matrix products, small beside a large kernel

CUT = PartitionSpec(ROW_AXES, tuple(axis for axis in MESH_AXES if axis not in ROW_AXES))


def logits(hidden_BTD: Array, kernel_VD: Array, platform: Platform) -> Array:
    """hidden kernel^T in the dtype of the hidden states, added up in float32."""
    return multiply(hidden_BTD, TransposedKernel(kernel_VD), platform, jnp.float32)


def by_columns(
    function: Callable[..., tuple[Array, ...]], kernels: Sequence[Array], *arrays: Array
) -> tuple[Array, ...]:
    """function(kernels, *arrays), over as many columns of the arrays at a time as make PIECE_BYTES of float32 logits.

    kernels: those of heads, (V, D). arrays: (B, T, ...) each, as the results are; what the function gives for a token
    must depend on no other. The last piece is filled up with zeros. On a mesh (`jax.set_mesh`) the rows must divide by
    data x fsdp; its other axes share the columns, and every device has the kernels whole.
    """
    (B, T), words, mesh = arrays[0].shape[:2], max(kernel.shape[0] for kernel in kernels), current_mesh()
    rows, parts = (1, 1) if mesh is None else (row_shards(mesh), mesh.size // row_shards(mesh))
    most = max(1, PIECE_BYTES // (4 * (B // rows) * words))
    pieces = -(-T // (parts * most))
    columns = -(-T // (parts * pieces))

    def part(kernels, *arrays):
        if pieces == 1:
            return function(kernels, *arrays)
        cut = [jnp.moveaxis(array.reshape(-1, pieces, columns, *array.shape[2:]), 1, 0) for array in arrays]
        found = jax.lax.map(lambda each: function(kernels, *each), cut)
        return tuple(jnp.moveaxis(array, 0, 1).reshape(-1, pieces * columns, *array.shape[3:]) for array in found)

    if mesh is not None:  # the compiler would have every device make the logits of all rows where fsdp cuts the kernel
        specs = (PartitionSpec(), *(CUT for _ in arrays))
        part = jax.shard_map(part, in_specs=specs, out_specs=CUT, check_vma=False)
    more = parts * pieces * columns - T
    arrays = [jnp.pad(array, ((0, 0), (0, more), *((0, 0),) * (array.ndim - 2))) for array in arrays]
    return tuple(array[:, :T] for array in part(kernels, *arrays))
