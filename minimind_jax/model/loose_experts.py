"""The experts of a mixture for generation on a CPU: each token's own, out of arrays they can be read from in place."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array

from minimind_jax.model.linear import TransposedKernel, multiply
from minimind_jax.model.tiles import make_tiles

# Experts of all layers together, up to which each has arrays of its own. Each is a branch of the program: 512 of them
# take some 5 s to compile.
APART = 256

# A tile of no more rows is multiplied as one of so many, where a kernel has so many numbers: 16 rows choose one of four
# experts by fours, and tiles of 8 are half padding then. An expert of 768 to 2,432 and back takes 1.6 ms with 4 rows,
# and 1.9 with 8.
SMALL, WIDE = 4, 2**20


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LooseKernels:
    """The kernels of E experts, in place of the (E, in, out) array.

    One TransposedKernel an expert, which is read where it lies: out of a stack XLA on a CPU copies an expert's kernel
    before the product, and an einsum over the stack takes 117 ms a layer (one row, 4 experts, 768 to 2,432 and back)
    where these take 0.7. Or the stack, for many experts.
    """

    kernels: tuple[TransposedKernel, ...] | Array

    def __getitem__(self, _) -> "LooseKernels":
        return self  # as nnx.Param reads its array

    @classmethod
    def of(cls, kernel_EIO: Array, layers: int) -> "LooseKernels":
        """layers: of the model."""
        is_apart = len(kernel_EIO) * layers <= APART
        return cls(tuple(TransposedKernel(kernel_IO.T) for kernel_IO in kernel_EIO) if is_apart else kernel_EIO)

    def __len__(self) -> int:
        return len(self.kernels)

    def astype(self, dtype: jnp.dtype) -> "LooseKernels":
        return jax.tree.map(lambda kernel: kernel.astype(dtype), self)


def apply_to_one(x_1D: Array, experts_k: Array, weights_k: Array, *kernels: LooseKernels) -> Array:
    """sum_j weights_j * down_e(silu(gate_e(x)) * up_e(x)), e = experts_j, of a single row, which needs no sorting."""
    add = lambda j, out_1D: out_1D + weights_k[j] * _apply_expert(experts_k[j], x_1D, kernels)  # noqa: E731
    return jax.lax.fori_loop(0, len(experts_k), add, jnp.zeros(x_1D.shape)).astype(x_1D.dtype)


def apply_loose(x_PD: Array, sizes_E: Array, *kernels: LooseKernels) -> Array:
    """down_e(silu(gate_e(x)) * up_e(x)) of rows sorted by expert, sizes_E each; others are finite. No gradient."""
    P, E = len(x_PD), len(sizes_E)
    tiles = make_tiles(sizes_E, P, _tile_size(P, E))
    padded_PD = jnp.pad(x_PD, ((0, tiles.size), (0, 0)))

    def body(tile, out_PD):
        first = tiles.firsts_N[tile]
        x_SD = jax.lax.dynamic_slice_in_dim(padded_PD, first, tiles.size)
        own_SD = _apply_expert(tiles.experts_N[tile], x_SD, kernels, tiles.stops_N[tile] - first)
        # Where a tile reaches into the rows of the next, that one writes over it.
        return jax.lax.dynamic_update_slice_in_dim(out_PD, own_SD, first, axis=0)

    return jax.lax.fori_loop(0, tiles.needed, body, jnp.zeros_like(padded_PD))[:P]


def _apply_expert(expert, x_SD, kernels, count=None):
    """The expert of some rows, of which it is asked for the first `count`."""
    stacks, is_small = [each.kernels for each in kernels], False
    if not isinstance(stacks[0], tuple):
        return _expert([stack[expert] for stack in stacks], x_SD)
    experts = list(zip(*stacks, strict=True))
    branches = [functools.partial(_expert, own) for own in experts]
    if len(x_SD) > SMALL and experts[0][0].kernel_OI.size >= WIDE:
        is_small = count <= SMALL
        branches += [functools.partial(_small, own) for own in experts]
    return jax.lax.switch(expert + len(experts) * is_small, branches, x_SD)


def _small(kernels, x_SD):
    """Of the first rows; zeros behind them."""
    return jnp.zeros_like(x_SD).at[:SMALL].set(_expert(kernels, x_SD[:SMALL]))


def _expert(kernels, x_SD):
    gate, up, down = kernels
    gate_SF, up_SF = multiply(x_SD, gate, "cpu"), multiply(x_SD, up, "cpu")
    return multiply(jax.nn.silu(gate_SF) * up_SF, down, "cpu")


def _tile_size(rows: int, experts: int) -> int:
    """Reading an expert takes as long as 8 rows of products, so that few rows should be one tile; of many rows half a
    tile is wasted at most."""
    few = min(rows, 2 * -(-rows // experts), 8)
    return min(128, max(few, rows // (2 * experts)))
